"""Images as people see them: [-1, 1] floats <-> uint8, grids, PNG, GIF and npz files.

Files are whole or absent: each is written beside its place and moved there. Paths go through `etils.epath`, so that
`gs://` works where its driver is installed.
"""

import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

if TYPE_CHECKING:
    from PIL import Image

PathLike: TypeAlias = str | os.PathLike[str]

_TILE_HEIGHT = 64  # pixels: smaller images are enlarged to it, because nobody can read 8x8 pixels on a screen ...
_PICTURE_SIDE = 1500  # ... as long as the whole picture fits on that screen


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
    """Map uint8 0 ... 255 to float32 -1 ... 1: x / 127.5 - 1. Any shape; works under `jit`.

    Raises:
        ValueError: the images are not uint8, so their range is unknown.
    """
    _require_uint8(images)
    # Not x / 127.5 - 1: XLA multiplies by the reciprocal, and 255 would become 1.0000001 under `jit`.
    return (jnp.asarray(images).astype(jnp.float32) - 127.5) / 127.5


@overload
def to_uint8(x: np.ndarray) -> np.ndarray: ...
@overload
def to_uint8(x: jax.Array) -> jax.Array: ...
def to_uint8(x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Map floats to uint8: round((clip(x, -1, 1) + 1) * 127.5), the exact inverse of `to_float`.

    Any shape, any float dtype, computed in float32; numpy gives numpy, JAX gives JAX, under `jit` too. What lies
    outside [-1, 1] is clipped and does not wrap; NaN becomes 0 (black), where a bare cast depends on the machine.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    clipped = xp.clip(xp.nan_to_num(x.astype(xp.float32), nan=-1.0, posinf=1.0, neginf=-1.0), -1.0, 1.0)
    return xp.round((clipped + 1.0) * 127.5).astype(xp.uint8)


def enlarge(images: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel `scale` times in both directions: [... H W C] -> [... H*scale W*scale C]."""
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)


def grid(
    images: np.ndarray | jax.Array,
    columns: int | None = None,
    padding: int = 2,
    background: int = 255,
    scale: int | None = None,
) -> np.ndarray:
    """Lay images out row by row: uint8 [N H W C] -> uint8 [H' W' C].

    Args:
        images: uint8 [N H W C], N > 0.
        columns: images in a row; left out, the least number that makes no more rows than columns.
        padding: pixels between the images and around them.
        background: the gray value, 0 ... 255, of the padding and of cells without an image.
        scale: enlarges each image by this factor. Left out, it is the least factor that makes images 64 pixels high,
            or what keeps the picture within 1500 x 1500 pixels where that is less, and at least 1.

    Raises:
        ValueError: the images are not uint8 [N H W C], or there is none.
    """
    images = np.asarray(images)
    _require_uint8(images)
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"a grid needs images of shape [N H W C] with N > 0; got {list(images.shape)}")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    images = enlarge(images, scale or _readable_scale(rows, columns, images.shape[1], images.shape[2], padding))
    return _tile(images, rows, columns, padding, background)


def save_png(path: PathLike, image: np.ndarray | jax.Array) -> None:
    """Write one picture: uint8 [H W], [H W 1] or [H W 3] -> a PNG file, which holds the same pixels.

    Raises:
        ValueError: the path does not end in .png, or the image has another dtype or shape.
    """
    check_suffix(path, ".png")
    buffer = io.BytesIO()
    _pillow_image(image).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_gif(
    path: PathLike, frames: Sequence[np.ndarray | jax.Array], *, seconds: float = 4.0, hold: float = 1.5
) -> None:
    """Write an animation that repeats for ever: frames of uint8 [H W], [H W 1] or [H W 3] -> a GIF file.

    Gray frames keep their pixels; colour frames are reduced to 256 colours, chosen frame by frame. GIF counts in
    hundredths of a second, and no frame is shorter than two of them: browsers slow shorter ones down to ten.

    Args:
        path: ends in .gif.
        frames: one or more, all of one shape.
        seconds: length of one round, the hold included.
        hold: how long the last frame stays, in seconds.

    Raises:
        ValueError: the path does not end in .gif, there is no frame, a frame has another dtype or shape, or
            `seconds` is shorter than `hold`.
    """
    check_suffix(path, ".gif")
    if len(frames) == 0:
        raise ValueError(f"{os.fspath(path)}: an animation needs at least one frame")
    pictures = [_palette_image(frame) for frame in frames]
    milliseconds = _durations(len(pictures), seconds, hold)
    first, *others = pictures
    buffer = io.BytesIO()
    # Unless told not to "optimize", Pillow (13.0) may give a gray frame the wrong palette.
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=False)
    write_atomically(path, buffer.getvalue())


def save_npz(path: PathLike, **arrays: np.ndarray | jax.Array) -> None:
    """Write named arrays of any shape and dtype to an uncompressed .npz file.

    Raises:
        ValueError: the path does not end in .npz.
    """
    check_suffix(path, ".npz")
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
    write_atomically(path, buffer.getvalue())


def check_suffix(path: PathLike, suffix: str) -> None:
    """Refuse a path that does not end in `suffix`; programs ask before the work whose result goes there.

    Raises:
        ValueError: one line that names the path and the remedy.
    """
    if epath.Path(path).suffix.lower() != suffix:
        kind = suffix[1:].upper()
        raise ValueError(f"{os.fspath(path)}: this file is written as {kind}; give a path that ends in {suffix}")


def write_atomically(path: PathLike, data: bytes) -> None:
    """Write a file whole or not at all, replacing what was there; folders on the way are made.

    Raises:
        OSError: the place cannot be written; nothing is left behind.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a move between file systems is a copy, which can be interrupted.
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except BaseException:  # Ctrl-C too leaves nothing behind
        temporary.unlink(missing_ok=True)
        raise


def _require_uint8(images: np.ndarray | jax.Array) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images (0 ... 255), got {images.dtype}; images.to_uint8 makes them of floats")


def _readable_scale(rows: int, columns: int, height: int, width: int, padding: int) -> int:
    readable = math.ceil(_TILE_HEIGHT / height)
    fits_height = (_PICTURE_SIDE - padding * (rows + 1)) // (rows * height)
    fits_width = (_PICTURE_SIDE - padding * (columns + 1)) // (columns * width)
    return max(1, min(readable, fits_height, fits_width))


def _tile(images: np.ndarray, rows: int, columns: int, padding: int, background: int) -> np.ndarray:
    count, height, width, channels = images.shape
    down, right = height + padding, width + padding
    canvas = np.full((rows * down + padding, columns * right + padding, channels), background, np.uint8)
    for i in range(count):
        top, left = padding + i // columns * down, padding + i % columns * right
        canvas[top : top + height, left : left + width] = images[i]
    return canvas


def _pillow_image(image: np.ndarray | jax.Array) -> "Image.Image":
    from PIL import Image

    pixels = np.asarray(image)
    _require_uint8(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ValueError(f"a picture has shape [H W], [H W 1] or [H W 3]; got {list(pixels.shape)}")
    return Image.fromarray(pixels)


def _palette_image(frame: np.ndarray | jax.Array) -> "Image.Image":
    picture = _pillow_image(frame)
    # A palette for each frame (median cut) and not one for all: noise would take most of it from the final pictures.
    # No dithering: at this size its dots are seen sooner than the bands that it hides.
    return picture.quantize(256) if picture.mode == "RGB" else picture


def _durations(num_frames: int, seconds: float, hold: float) -> list[int]:
    if seconds < hold:
        raise ValueError(f"seconds = {seconds} is shorter than hold = {hold}; make it longer, or hold the end less")
    # Rounding the moments, not the spans between them, keeps the sum right.
    moments = np.round(np.linspace(0, 100 * (seconds - hold), num_frames))
    hundredths = np.append(np.maximum(np.diff(moments), 2), max(round(100 * hold), 2))
    return [10 * int(span) for span in hundredths]
