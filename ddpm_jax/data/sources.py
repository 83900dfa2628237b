"""Where images come from: `load` and the two sources that need no TensorFlow."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ddpm_jax.data.image_set import DataError, ImageSet, fit_arrays

_SCHEMES = "'tfds:<name>', 'folder:<path>', 'npz:<path>' or 'sklearn:digits'"


def load(source: str, *, image_size: int, channels: int, split: str = "train", data_dir: str | None = None) -> ImageSet:
    """Read a whole data set into host memory, centre-cropped, resized with antialias, in `channels` colours.

    The order is always the same, so `batch_indices` gives the same batches on every machine. All of the pixels are
    decoded once; a bar shows how far that has come.

    Args:
        source: `tfds:<name>` or `tfds:<name>/<config>`; `folder:<path>`, images in any depth, whose sub-folders are
            the labels; `npz:<path>`, uint8 `images` [N H W C] or [N H W] and optional integer `labels` [N];
            `sklearn:digits`, the 1,797 digits that ship with scikit-learn.
        image_size: height and width S of the result, in pixels.
        channels: 1 (gray) or 3 (colour); alpha is dropped.
        split: of TFDS, for example "train+validation" or "train[:10%]"; the other sources have one split only.
        data_dir: where TFDS looks for prepared data sets and puts new ones; None is TFDS's own choice.

    Returns:
        ImageSet of uint8 [N S S C] and int32 [N] (or None).

    Raises:
        DataError: the source, or what lies there, cannot be used; the line names the field, the value and the remedy.
    """
    check_fit(image_size, channels)
    scheme, _, rest = source.partition(":")
    if not rest or scheme not in ("tfds", "folder", "npz", "sklearn"):
        raise DataError(f"data.source={source!r} is unknown: give {_SCHEMES}")
    if scheme == "npz":
        return _load_npz(source, Path(rest).expanduser(), image_size, channels)
    if scheme == "sklearn":
        return _load_sklearn(source, image_size, channels)
    # These two import TensorFlow, which takes seconds.
    if scheme == "folder":
        from ddpm_jax.data.folder import load_folder

        return load_folder(source, Path(rest).expanduser(), image_size, channels)
    from ddpm_jax.data.tfds import load_tfds

    return load_tfds(source, rest, split, data_dir, image_size, channels)


def check_fit(image_size: int, channels: int) -> None:
    """Refuse what no image can be fitted to."""
    if image_size < 1:
        raise DataError(f"data.image_size={image_size} is no size: give at least one pixel")
    if channels not in (1, 3):
        raise DataError(f"data.channels={channels} is neither 1 (gray) nor 3 (colour)")


def needs_tensorflow(source: str) -> bool:
    """Tell whether reading `source` imports TensorFlow."""
    return source.startswith(("tfds:", "folder:"))


def _load_npz(source: str, path: Path, image_size: int, channels: int) -> ImageSet:
    if not path.is_file():
        raise DataError(f"data.source={source!r}: there is no such file; give the path of an .npz")
    arrays = _read_npz(source, path)
    if "images" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise DataError(f"data.source={source!r} holds {found}: save the pixels as `images`, uint8 [N H W C]")
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not images.size:
        have = arrays["images"]
        raise DataError(
            f"data.source={source!r}: `images` is {have.dtype} {list(have.shape)}; "
            "save it as uint8 [N H W C] with C = 1, 3 or 4 and at least one image"
        )
    return ImageSet(fit_arrays(images, image_size, channels), _npz_labels(source, arrays, len(images)))


def _read_npz(source: str, path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    # What np.load raises for text, for a torn archive and for pickled objects; a bare .npy is no context manager.
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"data.source={source!r} is no readable .npz ({_first_line(error)}): write it with numpy.savez(images=...)"
        ) from error


def _npz_labels(source: str, arrays: dict[str, np.ndarray], count: int) -> np.ndarray | None:
    labels = arrays.get("labels")
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"data.source={source!r}: `labels` is {labels.dtype} {list(labels.shape)}; "
            f"save one integer an image, [{count}], or leave `labels` out"
        )
    return labels.astype(np.int32)


def _load_sklearn(source: str, image_size: int, channels: int) -> ImageSet:
    if source != "sklearn:digits":
        raise DataError(f"data.source={source!r} is unknown: scikit-learn gives 'sklearn:digits' only")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]  # the values are 0 … 16
    return ImageSet(fit_arrays(images, image_size, channels), digits.target.astype(np.int32))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
