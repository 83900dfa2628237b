"""What every source returns, the error it raises, and the fitting of pictures without TensorFlow."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from ddpm_jax.progress import progress


class ImageSet(NamedTuple):
    """A whole data set in host memory.

    images: uint8 [N H W C], H = W, C = 1 or 3.
    labels: int32 [N], or None where the source has none.
    """

    images: np.ndarray
    labels: np.ndarray | None


class Encoded(NamedTuple):
    """Some images of a stream, as their files hold them.

    images: what `Stream.decode` takes, n of them.
    labels: int32 [n], or None.
    indices: int64 [n], which images of the set they are.
    """

    images: list[Any]
    labels: np.ndarray | None
    indices: np.ndarray


class Stream(NamedTuple):
    """A data set that stays where it is and is decoded as it is served.

    source: its name.
    num_images: N.
    image_shape: [H W C] of an image once it is decoded.
    has_labels: whether it has one integer label an image.
    labels: int32 [N] where they are known before anything is read.
    order: (seed, step, batch_size) -> indices int64 [B], flips bool [B] of one global batch.
    pick: indices -> those images, wherever they lie.
    follow: (seed, batch_size, rows, first_step, closed) -> (step) -> those rows of the step's batch; the steps must
        follow each other; reading ahead ends when `closed` is set.
    decode: a tensor of one of `Encoded.images` -> a tensor uint8 [H W C], inside tf.data.
    stand_in: index of an image that cannot be decoded -> image uint8 [H W C] and index of the one in its place.
    """

    source: str
    num_images: int
    image_shape: tuple[int, int, int]
    has_labels: bool
    labels: np.ndarray | None
    order: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]
    pick: Callable[[np.ndarray], Encoded]
    follow: Callable[[int, int, np.ndarray, int, threading.Event], Callable[[int], Encoded]]
    decode: Callable[[Any], Any]
    stand_in: Callable[[int], tuple[np.ndarray, int]]


class DataError(ValueError):
    """A user's mistake in `data.*`: one line that names the field, its value and the remedy."""


def read_picture(path: str, image_size: int, channels: int) -> np.ndarray:
    """One picture from a file of any kind that Pillow reads, upright and fitted as those of a folder: uint8 [S S C].

    Raises:
        DataError: the file is absent or no picture.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as picture:
            return fit_picture(ImageOps.exif_transpose(picture), image_size, channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as a picture ({reason}); give a PNG or JPEG file") from None


def fit_picture(picture: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Centre-crop a picture to a square, convert its colours and resize it with antialias: uint8 [S S C]."""
    picture = picture.convert("RGB" if channels == 3 else "L")  # drops alpha, expands a palette
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    picture = picture.crop((left, top, left + side, top + side))
    if side != image_size:
        # Pillow widens the filter by the reduction, as tf.image.resize does with antialias=True.
        picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(image_size, image_size, channels)


def fit_arrays(images: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """Fit uint8 [N H W C], C = 1, 3 or 4, to uint8 [N S S channels]; nothing is copied where nothing changes."""
    count, height, width, _ = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, top : top + side, left : left + side]
    if images.shape[1:] == (image_size, image_size, channels):
        return np.ascontiguousarray(images)
    fitted = np.empty((count, image_size, image_size, channels), np.uint8)
    with progress(count, "resizing images", "img") as bar:
        for target, image in zip(fitted, images, strict=True):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            target[:] = fit_picture(picture, image_size, channels)
            bar.update(1)
    return fitted
