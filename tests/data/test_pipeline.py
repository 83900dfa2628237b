import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ddpm_jax.data import DataError, ImageSet, batch_indices, batches, index_batches
from ddpm_jax.data.decoding import _empty_aligned, as_tensor

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
LABELED = ImageSet(IMAGES, np.arange(100, 130, dtype=np.int32))
BARE = ImageSet(IMAGES[..., :1].copy(), None)

servers = pytest.mark.parametrize("use_tensorflow", [False, True], ids=["numpy", "tf.data"])


def take(count: int, image_set: ImageSet = LABELED, **options) -> list[dict[str, np.ndarray]]:
    iterator = batches(image_set, **{"seed": 0, "batch_size": 8} | options)
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


def assert_same(one: list[dict[str, np.ndarray]], two: list[dict[str, np.ndarray]]) -> None:
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@servers
def test_a_batch_is_what_the_order_says(use_tensorflow):
    for step, batch in enumerate(take(12, use_tensorflow=use_tensorflow)):
        indices, flips = batch_indices(0, step, 8, 30)
        expected = [IMAGES[i, :, ::-1] if flip else IMAGES[i] for i, flip in zip(indices, flips, strict=True)]
        np.testing.assert_array_equal(batch["image"], expected)
        np.testing.assert_array_equal(batch["label"], LABELED.labels[indices])


@servers
def test_a_batch_is_ready_for_the_device(use_tensorflow):
    (batch,) = take(1, use_tensorflow=use_tensorflow)
    assert isinstance(batch["image"], np.ndarray)
    assert batch["image"].flags.c_contiguous
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert batch["image"].shape == (8, 6, 5, 3)
    (bare,) = take(1, BARE, use_tensorflow=use_tensorflow)
    assert list(bare) == ["image"]
    assert bare["image"].shape == (8, 6, 5, 1)


@servers
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(use_tensorflow):
    assert_same(take(4, use_tensorflow=use_tensorflow, first_step=9), take(13, use_tensorflow=use_tensorflow)[9:])


def test_both_servers_agree_over_many_steps():
    assert_same(take(600, use_tensorflow=True, first_step=3), take(600, first_step=3))  # tf.data gets 256 at once


@servers
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5], [1, 2, 6], [7]])
def test_a_process_serves_its_rows_of_the_global_batch(use_tensorflow, rows):
    whole = [{name: x[rows] for name, x in batch.items()} for batch in take(6)]
    assert_same(take(6, use_tensorflow=use_tensorflow, rows=np.array(rows)), whole)


@servers
def test_without_flips_the_order_is_the_same(use_tensorflow):
    for step, batch in enumerate(take(5, use_tensorflow=use_tensorflow, random_flip=False)):
        np.testing.assert_array_equal(batch["image"], IMAGES[batch_indices(0, step, 8, 30)[0]])


@servers
def test_a_batch_may_be_larger_than_the_set(use_tensorflow):
    batch = take(1, use_tensorflow=use_tensorflow, batch_size=70)[0]
    assert np.bincount(batch["label"], minlength=130)[100:].tolist().count(2) == 20  # 70 = 2 * 30 + 10


@pytest.mark.parametrize("random_flip", [False, True])
def test_the_device_gathers_the_same_batches(random_flip):
    options = {"seed": 5, "batch_size": 8, "first_step": 3, "random_flip": random_flip, "rows": np.array([2, 3, 7])}
    orders = itertools.islice(index_batches(30, **options), 6)
    for order, batch in zip(orders, take(6, **options), strict=True):
        assert order["index"].dtype == np.int32
        assert order["flip"].dtype == np.bool_
        images = IMAGES[order["index"]]
        gathered = np.where(order["flip"][:, None, None, None], images[:, :, ::-1], images)
        np.testing.assert_array_equal(gathered, batch["image"])


@pytest.mark.parametrize("serve", [lambda **options: batches(LABELED, **options), lambda **o: index_batches(30, **o)])
def test_an_empty_batch_is_refused_at_once(serve):
    with pytest.raises(DataError, match=r"train.batch_size=0"):
        serve(seed=0, batch_size=0)


def test_an_empty_set_is_refused_at_once():
    with pytest.raises(DataError, match="holds no image"):
        batches(ImageSet(IMAGES[:0], None), seed=0, batch_size=2)


@servers
def test_errors_reach_the_consumer(use_tensorflow):
    iterator = batches(LABELED, seed=-1, batch_size=8, use_tensorflow=use_tensorflow)
    with pytest.raises(Exception, match="batch_indices needs seed"):
        next(iterator)


def test_batches_are_prepared_ahead_but_not_without_limit(monkeypatch):
    asked = []

    def spy(seed, step, *rest):
        if seed == 77:  # not the last moments of another test's thread
            asked.append(step)
        return batch_indices(seed, step, *rest)

    monkeypatch.setattr("ddpm_jax.data.pipeline.batch_indices", spy)
    iterator = batches(LABELED, seed=77, batch_size=8)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert asked == [0, 1, 2, 3, 4]
    iterator.close()


def test_closing_ends_the_thread():
    before = set(threading.enumerate())
    iterator = batches(LABELED, seed=0, batch_size=8)
    next(iterator)
    (thread,) = set(threading.enumerate()) - before
    iterator.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


@servers
def test_a_program_ends_with_an_open_iterator(use_tensorflow):
    code = f"""
import numpy as np
from ddpm_jax.data import ImageSet, batches
image_set = ImageSet(np.zeros((50, 8, 8, 3), np.uint8), None)
iterator = batches(image_set, seed=0, batch_size=4, use_tensorflow={use_tensorflow})
print(next(iterator)["image"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "(4, 8, 8, 3)\n"), done.stderr
    assert "Error" not in done.stderr
    assert "ignored" not in done.stderr


def test_tensorflow_shares_the_memory_of_decoded_images():
    shared = _empty_aligned((7, 3), np.int32)
    shared[:] = 1
    tensor = as_tensor(shared)
    shared[0, 0] = 5
    assert tensor.numpy()[0, 0] == 5
    unaligned = np.ones(100, np.uint8)[1:]
    frozen = np.ones(3, np.uint8)
    frozen.flags.writeable = False
    for array in (unaligned, frozen, IMAGES[:0], IMAGES[:, ::2]):
        np.testing.assert_array_equal(as_tensor(array).numpy(), array)
