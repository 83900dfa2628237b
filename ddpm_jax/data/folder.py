"""Images from a folder, `folder:<path>`."""

import contextlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_jax.data.decoding import collect, fit, import_tensorflow
from ddpm_jax.data.image_set import DataError, Encoded, ImageSet, Stream, fit_picture
from ddpm_jax.data.order import batch_indices
from ddpm_jax.progress import progress

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
_MAX_NAMED = 10
_MAX_UNREADABLE = 100  # files one after the other, before a stream gives up


def load_folder(source: str, root: Path, image_size: int, channels: int) -> ImageSet:
    """Read every image below `root`, in the order of their sorted paths.

    An animated GIF gives its first frame. Files with other suffixes and hidden ones are no images; image files that
    cannot be decoded are skipped with one warning. Labels are the ranks of the sorted names of the folders that lie
    directly in `root`, or None if an image lies in `root` itself.
    """
    names = _listed(source, root)
    images, kept = _decode([str(root / name) for name in names], image_size, channels)
    if not len(kept):
        raise DataError(
            f"data.source={source!r}: none of its {len(names)} image files can be read, "
            f"the first is {names[0]!r}; copy them again"
        )
    unreadable = sorted(set(range(len(names))) - set(kept.tolist()))
    if unreadable:
        _warn(source, [names[i] for i in unreadable], len(names))
    labels = _labels(names)
    return ImageSet(images, None if labels is None else labels[kept])


def open_folder(source: str, root: Path, image_size: int, channels: int) -> Stream:
    """List the images below `root`, to be read as they are served, in the order that those of `load_folder` have.

    Which files cannot be read is not known before; the next one in the order of paths that can stands in for such a
    file, label included, in the same place for any number of processes.
    """
    tf = import_tensorflow()
    names = _listed(source, root)
    paths, labels = [str(root / name) for name in names], _labels(names)

    def order(seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        return batch_indices(seed, step, batch_size, len(paths))

    def pick(indices: np.ndarray) -> Encoded:
        return Encoded([paths[i] for i in indices], None if labels is None else labels[indices], indices)

    def follow(seed: int, batch_size: int, rows: np.ndarray, *_: Any) -> Callable[[int], Encoded]:
        return lambda step: pick(order(seed, step, batch_size)[0][rows])

    return Stream(
        source=source,
        num_images=len(paths),
        image_shape=(image_size, image_size, channels),
        has_labels=labels is not None,
        labels=labels,
        order=order,
        pick=pick,
        follow=follow,
        decode=tf.function(  # traced once, and not in every chunk of the stream
            partial(_read_with_tensorflow, image_size=image_size, channels=channels),
            input_signature=[tf.TensorSpec((), "string")],
        ),
        stand_in=_Neighbours(source, paths, image_size, channels),
    )


class _Neighbours:
    """Finds the image in the place of one that TensorFlow cannot decode, and says once which files cannot be read."""

    def __init__(self, source: str, paths: list[str], image_size: int, channels: int):
        self._source, self._paths, self._fit = source, paths, (image_size, channels)
        self._named: set[int] = set()

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        for near in range(index, index + min(_MAX_UNREADABLE, len(self._paths))):
            near %= len(self._paths)
            image = _read(self._paths[near], *self._fit)
            if image is not None:
                return image, near
            self._name(near)
        raise DataError(
            f"data.source={self._source!r}: {self._paths[index]} and the {min(_MAX_UNREADABLE, len(self._paths)) - 1} "
            "image files after it cannot be read; copy them again"
        )

    def _name(self, index: int) -> None:
        if index not in self._named:
            self._named.add(index)
            warnings.warn(
                f"data.source={self._source!r}: {self._paths[index]} cannot be read; the next file stands in for it",
                stacklevel=3,
            )


def _read(path: str, image_size: int, channels: int) -> np.ndarray | None:
    tf = import_tensorflow()
    with contextlib.suppress(tf.errors.OpError):
        return _read_with_tensorflow(path, image_size, channels).numpy()
    return _read_with_pillow(path, image_size, channels)


def _read_with_tensorflow(path: Any, image_size: int, channels: int) -> Any:
    tf = import_tensorflow()
    # Three channels always: TensorFlow refuses a gray GIF.
    image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
    return fit(tf.ensure_shape(image, (None, None, 3)), image_size, channels)


def _listed(source: str, root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"data.source={source!r}: there is no such folder; give one that holds images")
    names = _image_names(root)
    if not names:
        raise DataError(f"data.source={source!r} holds no image: put {', '.join(_SUFFIXES)} files there, in any depth")
    return names


def _image_names(root: Path) -> list[str]:
    """List the image files below `root` as sorted relative paths with forward slashes."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        # Hidden files are what operating systems leave behind, such as the ._flower.jpg of macOS.
        images = (name for name in files if name.lower().endswith(_SUFFIXES) and not name.startswith("."))
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in images]
    return sorted(names)


def _labels(names: list[str]) -> np.ndarray | None:
    classes = [name.split("/")[0] for name in names if "/" in name]
    if len(classes) < len(names):
        return None
    return np.unique(classes, return_inverse=True)[1].astype(np.int32)


def _decode(paths: list[str], image_size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode what can be decoded: images uint8 [K S S C] and their indices int64 [K], ascending."""
    tf = import_tensorflow()

    def read(index: Any, path: Any) -> dict[str, Any]:
        return {"index": index, "image": _read_with_tensorflow(path, image_size, channels)}

    dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(paths)), paths))
    dataset = dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    # The index travels with its image and so tells which files were dropped.
    read_by_tf = collect(dataset.ignore_errors(log_warning=False), len(paths))
    images, kept = read_by_tf["image"], read_by_tf["index"]
    if len(kept) == len(paths):
        return images, kept
    missing = np.setdiff1d(np.arange(len(paths)), kept)
    rescued = _decode_with_pillow([paths[i] for i in missing], image_size, channels)
    found = [i for i, image in zip(missing, rescued, strict=True) if image is not None]
    pillow_images = np.array([image for image in rescued if image is not None], np.uint8)
    images = np.concatenate([images, pillow_images.reshape(-1, *images.shape[1:])])
    kept = np.concatenate([kept, np.array(found, np.int64)])
    order = np.argsort(kept)
    return images[order], kept[order]


def _decode_with_pillow(paths: list[str], image_size: int, channels: int) -> list[np.ndarray | None]:
    """Try the files that TensorFlow refused: WebP and a few rare kinds of BMP and JPEG are Pillow's."""
    with progress(len(paths), "trying files again", "img") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        images = []
        for image in pool.map(partial(_read_with_pillow, image_size=image_size, channels=channels), paths):
            images.append(image)
            bar.update(1)
    return images


def _read_with_pillow(path: str, image_size: int, channels: int) -> np.ndarray | None:
    try:
        with Image.open(path) as picture:
            return fit_picture(picture, image_size, channels)
    except Exception:  # Pillow's plugins raise whatever they meet in a broken file: OSError, SyntaxError, …
        return None


def _warn(source: str, names: list[str], total: int) -> None:
    named = ", ".join(names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    warnings.warn(
        f"data.source={source!r}: skipped {len(names)} of {total} image files, which cannot be read: {named}{more}",
        stacklevel=4,
    )
