import itertools
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data
from ddpm_jax.data import DataError, decoding, records, stream

NUM_IMAGES = 23
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 9, 9, 3), dtype=np.uint8)
FIT = {"image_size": 8, "channels": 3}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A thousand images, prepared ahead, would be fifty epochs of these sets."""
    monkeypatch.setattr(stream, "_CHUNK_IMAGES", 8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for i, image in enumerate(PIXELS):
        save(root / f"class{i % 3}" / f"{i:02}.png", image)
    return root


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    """A set `many` in three files, whose labels are 0 … 22."""
    import tensorflow_datasets as tfds

    tf = decoding.import_tensorflow()
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    features = {"image": tfds.features.Image(shape=(9, 9, 3)), "label": tfds.features.Scalar(np.int64)}
    examples = tf.data.Dataset.from_tensor_slices({"image": PIXELS, "label": np.arange(NUM_IMAGES)})
    tfds.dataset_builders.store_as_tfds_dataset(
        name="many",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples},
        data_dir=data_dir,
        download_config=tfds.download.DownloadConfig(num_shards=3),
    )
    return data_dir


@pytest.fixture(params=["folder", "tfds"])
def opened(request, folder, tfds_dir) -> data.Stream:
    """A stream of either kind; that of TFDS shuffles seven images among themselves."""
    if request.param == "folder":
        return data.open_stream(f"folder:{folder}", **FIT)
    return data.open_stream("tfds:many", data_dir=tfds_dir, shuffle_buffer=7, **FIT)


def take(count: int, source: data.Stream, **options) -> list[dict[str, np.ndarray]]:
    batches = data.stream_batches(source, **{"seed": 3, "batch_size": 4, "num_classes": NUM_IMAGES} | options)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def assert_same(one: list[dict[str, np.ndarray]], two: list[dict[str, np.ndarray]]) -> None:
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
            assert first[name].dtype == second[name].dtype


# What is served, and in what order


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_a_stream_that_is_shuffled_whole_serves_what_the_host_serves(kind, folder, tfds_dir):
    where = {"folder": (f"folder:{folder}", None), "tfds": ("tfds:many", tfds_dir)}[kind]
    image_set = data.load(where[0], data_dir=where[1], **FIT)
    served = data.batches(image_set, seed=3, batch_size=4, first_step=2)
    found = take(20, data.open_stream(where[0], data_dir=where[1], **FIT), first_step=2)  # over three epochs
    assert_same(found, list(itertools.islice(served, 20)))
    assert found[0]["image"].flags.c_contiguous


def test_every_image_comes_once_an_epoch_and_epochs_differ(opened):
    order = np.concatenate([opened.order(3, step, 4)[0] for step in range(23)]).reshape(4, NUM_IMAGES)
    assert (np.sort(order) == np.arange(NUM_IMAGES)).all()
    assert len({tuple(epoch) for epoch in order}) == 4


def test_pixels_and_labels_are_those_of_the_order(tfds_dir):
    opened = data.open_stream("tfds:many", data_dir=tfds_dir, shuffle_buffer=7, **FIT)
    image_set = data.load("tfds:many", data_dir=tfds_dir, **FIT)
    for step, batch in enumerate(take(13, opened)):
        indices, flips = opened.order(3, step, 4)
        images = image_set.images[indices]
        expected = np.where(flips[:, None, None, None], images[:, :, ::-1], images)
        np.testing.assert_array_equal(batch["image"], expected)
        np.testing.assert_array_equal(batch["label"], image_set.labels[indices])


def test_flips_are_those_of_the_host_and_may_be_off(opened):
    plain, flipped = take(9, opened, random_flip=False), take(9, opened)
    for step, (one, other) in enumerate(zip(plain, flipped, strict=True)):
        flips = data.batch_indices(3, step, 4, NUM_IMAGES)[1]
        one["image"][flips] = one["image"][flips][:, :, ::-1]
        np.testing.assert_array_equal(one["image"], other["image"])


def test_parts_and_sums_of_splits_are_read_in_the_order_of_load(tfds_dir):
    for split, count in (("train[3:19]", 16), ("train[20:]+train[:5]", 8)):
        image_set = data.load("tfds:many", split=split, data_dir=tfds_dir, **FIT)
        opened = data.open_stream("tfds:many", split=split, data_dir=tfds_dir, shuffle_buffer=3, **FIT)
        (whole,) = take(1, opened, batch_size=count, random_flip=False)
        indices = opened.order(3, 0, count)[0]
        assert sorted(indices) == list(range(count)) == list(range(len(image_set.images)))
        np.testing.assert_array_equal(whole["label"], image_set.labels[indices])


def test_a_batch_may_be_larger_than_the_set(opened):
    (batch,) = take(1, opened, batch_size=60)
    (again,) = take(1, opened, batch_size=60, rows=np.arange(20, 60))
    np.testing.assert_array_equal(batch["image"][20:], again["image"])


# Stopping, going on, and other processes


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 2], [3]])
def test_a_run_goes_on_at_any_step_on_any_processes(opened, rows):
    whole = take(16, opened)
    for first_step in (0, 6, 13):
        mine = [{name: x[rows] for name, x in batch.items()} for batch in whole[first_step:]]
        assert_same(take(16 - first_step, opened, first_step=first_step, rows=np.array(rows)), mine)


def test_a_restart_reads_no_file_that_lies_behind_it(tfds_dir, monkeypatch):
    read, source = [], data.open_stream("tfds:many", data_dir=tfds_dir, shuffle_buffer=5, **FIT)
    windows = records._windows

    def spy(read_files, *rest):
        def read_and_note(files, skip):
            for example in read_files(files, skip):
                read.append(example[1])
                yield example

        return windows(read_and_note, *rest)

    monkeypatch.setattr(records, "_windows", spy)
    monkeypatch.setattr(stream, "_CHUNK_IMAGES", 1)
    far = 10**6
    (batch,) = take(1, source, first_step=far)
    assert set(batch["label"]) <= set(read)
    assert len(read) <= 8 * 5  # the windows of this batch and what is prepared ahead, and no epoch before


def test_a_process_holds_its_own_rows_of_a_few_windows(tfds_dir, monkeypatch):
    held, source = [], data.open_stream("tfds:many", data_dir=tfds_dir, shuffle_buffer=5, **FIT)
    windows = records._windows

    def spy(*args):
        for window in windows(*args):
            held.append(window)
            yield window

    monkeypatch.setattr(records, "_windows", spy)
    monkeypatch.setattr(stream, "_CHUNK_IMAGES", 1)
    take(3, source, rows=np.array([1]))
    assert all(len(window) <= 2 and {position % 4 for position in window} <= {1} for window in held)
    assert len(held) <= 8  # 7 steps lie ready at most, 28 images; and a window ahead of them


# What cannot be read


def test_the_next_file_stands_in_for_one_that_cannot_be_read(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    broken = [tmp_path / "class0" / "06.png", tmp_path / "class0" / "21.png"]  # the second is the last of its class
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    source = data.open_stream(f"folder:{tmp_path}", **FIT)
    with pytest.warns(UserWarning, match="cannot be read; the next file stands in for it") as caught:
        found = take(12, source, random_flip=False)
    assert sorted(str(x.message).count(str(path)) for x in caught for path in broken) == [0, 0, 1, 1]  # once each
    image_set = data.load(f"folder:{folder}", **FIT)
    stand_in = np.arange(NUM_IMAGES)
    stand_in[[2, 7]] = 3, 8  # class0 holds 00 03 06 … 21
    for step, batch in enumerate(found):
        indices = stand_in[source.order(3, step, 4)[0]]
        np.testing.assert_array_equal(batch["image"], image_set.images[indices])
        np.testing.assert_array_equal(batch["label"], image_set.labels[indices])


def test_what_only_pillow_reads_is_no_broken_file(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.{'webp' if i % 2 else 'png'}", np.full((8, 8, 3), 60 * i, np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = take(1, data.open_stream(f"folder:{tmp_path}", **FIT), num_classes=0)
    assert sorted(np.round(batch["image"].mean((1, 2, 3)) / 60)) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*stands in for it")
def test_a_folder_of_broken_files_is_one_line(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no image")
    with pytest.raises(DataError, match=r"data.source='folder:.*\d.png and the 2 image files after it cannot be read"):
        take(1, data.open_stream(f"folder:{tmp_path}", **FIT), num_classes=0)


def test_damaged_records_are_one_line(tfds_dir, tmp_path):
    import shutil

    shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
    record = sorted(tmp_path.glob("many/1.0.0/*record*"))[1]
    record.write_bytes(record.read_bytes()[:-50])
    source = data.open_stream("tfds:many", data_dir=str(tmp_path), **FIT)
    with pytest.raises(DataError, match=r"'tfds:many' is damaged: remove .* and prepare it again") as error:
        take(9, source)
    assert "\n" not in str(error.value)


def test_labels_are_checked_as_they_pass(opened, tmp_path):
    largest = 2 if opened.source.startswith("folder") else NUM_IMAGES - 1
    with pytest.raises(
        DataError, match=rf"model.num_classes={largest}: .* labels from \d+ to {largest}; use {largest + 1}"
    ):
        take(20, opened, num_classes=largest)
    assert list(take(1, opened, num_classes=0)[0]) == ["image"]
    save(tmp_path / "a.png", PIXELS[0])
    with pytest.raises(DataError, match=r"model.num_classes=2: .* has no labels; use 0"):
        data.stream_batches(data.open_stream(f"folder:{tmp_path}", **FIT), seed=0, batch_size=1, num_classes=2)


def test_other_mistakes_are_refused_at_once(opened, tmp_path, tfds_dir):
    with pytest.raises(DataError, match=r"train.batch_size=0"):
        data.stream_batches(opened, seed=0, batch_size=0)
    for source in ("npz:a.npz", "sklearn:digits", "folder:", "nothing"):
        with pytest.raises(DataError, match=r"use data.placement='host'"):
            data.open_stream(source, **FIT)
    with pytest.raises(DataError, match="holds no image"):
        data.open_stream(f"folder:{tmp_path}", **FIT)
    with pytest.raises(DataError, match=r"data.split='valid' is no split"):
        data.open_stream("tfds:many", split="valid", data_dir=tfds_dir, **FIT)
    with pytest.raises(DataError, match=r"data.channels=2"):
        data.open_stream("tfds:many", image_size=8, channels=2)


# A few images, and the end


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_some_images_are_those_of_the_whole_set(kind, folder, tfds_dir):
    source, data_dir = (f"folder:{folder}", None) if kind == "folder" else ("tfds:many", tfds_dir)
    counts = []

    def choose(count: int) -> np.ndarray:
        counts.append(count)
        return np.array([20, 4, 4, 0, 11, 22])

    one, other = (
        data.load_some(source, choose, streamed=streamed, data_dir=data_dir, **FIT) for streamed in (False, True)
    )
    assert counts == [NUM_IMAGES, NUM_IMAGES]
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)


def test_closing_ends_the_threads(opened):
    before = set(threading.enumerate())
    batches = data.stream_batches(opened, seed=0, batch_size=2)
    next(batches)
    threads = set(threading.enumerate()) - before
    assert threads
    batches.close()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.mark.slow
def test_a_program_ends_with_an_open_stream(tfds_dir):
    code = f"""
from ddpm_jax import data
source = data.open_stream("tfds:many", data_dir={tfds_dir!r}, image_size=8, channels=3, shuffle_buffer=5)
batches = data.stream_batches(source, seed=0, batch_size=4)
print(next(batches)["image"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "(4, 8, 8, 3)\n"), done.stderr
    assert "Error" not in done.stderr
