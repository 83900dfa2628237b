import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import images

ALL_VALUES = np.arange(256, dtype=np.uint8)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# [-1, 1] <-> uint8


@pytest.mark.parametrize("convert", [images.to_float, jax.jit(images.to_float)], ids=["eager", "jit"])
def test_uint8_maps_onto_minus_one_to_one(convert):
    x = convert(ALL_VALUES)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, np.linspace(-1, 1, 256), atol=1e-6)
    assert (x[0], x[255]) == (-1, 1)


def test_floats_are_refused_instead_of_scaled_twice():
    with pytest.raises(ValueError, match="float32"):
        images.to_float(np.zeros((2, 2), np.float32))


def test_all_256_values_survive_the_round_trip():
    x = images.to_float(ALL_VALUES)
    np.testing.assert_array_equal(images.to_uint8(x), ALL_VALUES)
    np.testing.assert_array_equal(images.to_uint8(np.asarray(x)), ALL_VALUES)
    np.testing.assert_array_equal(jax.jit(images.to_uint8)(x), ALL_VALUES)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_values_out_of_range_are_clipped_and_do_not_wrap(make):
    x = make(np.array([1.2, -1.2, 1e30, -1e30, np.inf, -np.inf, np.nan], np.float32))
    assert images.to_uint8(x).tolist() == [255, 0, 255, 0, 255, 0, 0]


def test_to_uint8_rounds_to_the_nearest_value():
    near = (np.array([99.6, 100.0, 100.4]) / 127.5 - 1).astype(np.float32)
    assert images.to_uint8(near).tolist() == [100, 100, 100]


def test_to_uint8_keeps_the_kind_of_array():
    assert type(images.to_uint8(np.zeros(3))) is np.ndarray
    assert isinstance(images.to_uint8(jnp.zeros(3, jnp.bfloat16)), jax.Array)


# Grids


def test_grid_is_row_major_and_fills_empty_cells_with_background():
    tiles = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    picture = images.grid(tiles, padding=0, background=9, scale=1)
    expected = [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 9, 9], [4, 4, 5, 5, 9, 9]]
    assert picture[:, :, 0].tolist() == expected


def test_padding_lies_between_and_around_the_images():
    tiles = noise(2, 3, 4, 3)
    picture = images.grid(tiles, columns=2, padding=2, scale=1)
    assert picture.shape == (2 + 3 + 2, 2 + 4 + 2 + 4 + 2, 3)
    np.testing.assert_array_equal(picture[2:5, 2:6], tiles[0])
    np.testing.assert_array_equal(picture[2:5, 8:12], tiles[1])
    picture[2:5, 2:6] = picture[2:5, 8:12] = 255
    assert (picture == 255).all()


def test_columns_may_be_given():
    assert images.grid(noise(6, 2, 2, 1), columns=6, padding=0, scale=1).shape == (2, 12, 1)


def test_enlarging_repeats_pixels():
    picture = images.enlarge(np.array([[[1], [2]]], np.uint8), 3)
    assert picture[:, :, 0].tolist() == [[1, 1, 1, 2, 2, 2]] * 3


@pytest.mark.parametrize(
    ("count", "side", "scale"),
    [(64, 8, 8), (64, 16, 4), (64, 28, 3), (64, 32, 2), (64, 64, 1), (1, 8, 8), (1000, 8, 5), (4096, 64, 1)],
)
def test_small_images_are_enlarged_until_they_are_readable(count, side, scale):
    columns = int(np.ceil(np.sqrt(count)))
    assert images.grid(np.zeros((count, side, side, 1), np.uint8)).shape[1] == columns * (side * scale + 2) + 2


@pytest.mark.parametrize("shape", [(0, 2, 2, 3), (2, 2, 3)])
def test_grid_refuses_what_is_no_batch(shape):
    with pytest.raises(ValueError, match="N H W C"):
        images.grid(np.zeros(shape, np.uint8))


# Files


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_png_holds_the_same_pixels(tmp_path, shape):
    picture = noise(*shape)
    images.save_png(tmp_path / "new" / "folder" / "a.png", jnp.asarray(picture))
    with Image.open(tmp_path / "new" / "folder" / "a.png") as read:
        assert (read.format, read.size) == ("PNG", (7, 5))
        np.testing.assert_array_equal(np.asarray(read), picture.reshape(np.asarray(read).shape))
    assert names(tmp_path / "new" / "folder") == ["a.png"]


def test_png_refuses_a_shape_that_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match=r"\[2, 5, 7, 3\]"):
        images.save_png(tmp_path / "a.png", noise(2, 5, 7, 3))
    with pytest.raises(ValueError, match="float64"):
        images.save_png(tmp_path / "a.png", np.zeros((5, 7)))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("save", "suffix"),
    [(images.save_png, ".png"), (lambda path, x: images.save_gif(path, [x]), ".gif")],
)
def test_another_suffix_is_refused_in_one_line_that_names_path_and_remedy(tmp_path, save, suffix):
    with pytest.raises(ValueError, match=f"flowers.jpg.*{suffix}") as raised:
        save(tmp_path / "flowers.jpg", noise(4, 4, 3))
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == []


def read_gif(path) -> tuple[list[np.ndarray], list[int]]:
    with Image.open(path) as gif:
        frames, durations = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")))
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0  # for ever
    return frames, durations


@pytest.mark.parametrize("count", [2, 8, 50])
def test_gif_shows_every_frame_and_holds_the_last(tmp_path, count):
    images.save_gif(tmp_path / "a.gif", noise(count, 6, 8, 3), seconds=4.0, hold=1.5)
    frames, durations = read_gif(tmp_path / "a.gif")
    assert len(frames) == count
    assert frames[0].shape == (6, 8, 3)
    assert sum(durations) == 4000
    assert durations[-1] == 1500
    assert max(durations[:-1]) - min(durations[:-1]) <= 10
    assert names(tmp_path) == ["a.gif"]


def test_gif_of_few_colours_or_of_grays_keeps_its_pixels(tmp_path):
    colour = noise(3, 6, 8, 3)  # 48 pixels, so 48 colours
    images.save_gif(tmp_path / "colour.gif", list(colour))
    np.testing.assert_array_equal(read_gif(tmp_path / "colour.gif")[0], colour)
    gray = np.stack([ALL_VALUES.reshape(16, 16, 1), noise(16, 16, 1), noise(16, 16, 1) // 2])
    images.save_gif(tmp_path / "gray.gif", gray)
    np.testing.assert_array_equal(read_gif(tmp_path / "gray.gif")[0], np.repeat(gray, 3, axis=-1))


def test_gif_frames_are_never_too_short_for_browsers(tmp_path):
    images.save_gif(tmp_path / "a.gif", noise(300, 2, 2, 1), seconds=1.0, hold=0.5)
    assert set(read_gif(tmp_path / "a.gif")[1][:-1]) == {20}


def test_gif_of_one_frame(tmp_path):
    images.save_gif(tmp_path / "a.gif", noise(1, 4, 4, 3))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 1


def test_gif_refuses_no_frames_and_a_hold_longer_than_the_whole(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        images.save_gif(tmp_path / "a.gif", [])
    with pytest.raises(ValueError, match=r"seconds = 1\.0"):
        images.save_gif(tmp_path / "a.gif", noise(2, 4, 4, 3), seconds=1.0)
    assert names(tmp_path) == []


def test_npz_returns_the_arrays(tmp_path):
    pictures, labels = noise(3, 4, 4, 3), np.arange(3)
    images.save_npz(tmp_path / "a.npz", images=jnp.asarray(pictures), labels=labels)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert sorted(read.files) == ["images", "labels"]
        np.testing.assert_array_equal(read["images"], pictures)
        np.testing.assert_array_equal(read["labels"], labels)
    with pytest.raises(ValueError, match=r"a\.npy"):
        images.save_npz(tmp_path / "a.npy", images=pictures)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    images.save_png(path, np.zeros((2, 2), np.uint8))
    before = path.read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(images.epath.Path(path)), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        images.save_png(path, noise(9, 9))
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.png"]
