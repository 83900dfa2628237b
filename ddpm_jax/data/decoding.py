"""Decoding with tf.data: the one place that imports TensorFlow, and what its two sources share."""

import contextlib
import functools
import math
import os
from typing import Any

import numpy as np

from ddpm_jax.progress import progress

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")
_ALIGNMENT = 64  # bytes; TensorFlow aborts the process on less
_BATCH = 64  # images handed over at once; the decoding itself is parallel by image


@functools.cache
def import_tensorflow() -> Any:
    """Import TensorFlow, quietly and blind to accelerators, whose memory is JAX's."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # no use for decoding, and announced in four lines
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        # A caller who has already used TensorFlow on a device has fixed the list: that is his decision.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    return tf


def fit(image: Any, image_size: int, channels: int) -> Any:
    """Centre-crop uint8 [H W C] to a square, convert its colours and resize with antialias: uint8 [S S channels]."""
    tf = import_tensorflow()
    if image.shape[-1] == channels:  # then it may be right already, as all of CIFAR-10 is: twice as fast
        is_right = tf.reduce_all(tf.equal(tf.shape(image)[:2], image_size))
        image = tf.cond(is_right, lambda: image, lambda: _crop_and_resize(image, image_size, channels))
    else:
        image = _crop_and_resize(image, image_size, channels)
    return tf.ensure_shape(image, (image_size, image_size, channels))


def _crop_and_resize(image: Any, image_size: int, channels: int) -> Any:
    tf = import_tensorflow()
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    side = tf.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = tf.cast(image[top : top + side, left : left + side], tf.float32)
    if image.shape[-1] in (2, 4):
        image = image[..., :-1]  # alpha
    if image.shape[-1] == 3 and channels == 1:
        image = tf.reduce_sum(image * tf.constant(_LUMA), axis=-1, keepdims=True)
    elif image.shape[-1] == 1 and channels == 3:
        image = tf.repeat(image, 3, axis=-1)
    image = tf.image.resize(image, (image_size, image_size), method="bilinear", antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(image, 0.0, 255.0)), tf.uint8)


def collect(dataset: Any, total: int) -> dict[str, np.ndarray]:
    """Run a tf.data set of at most `total` dicts once and stack each field, in order, into one array [n ...]."""
    arrays = {
        name: _empty_aligned((total, *spec.shape), spec.dtype.as_numpy_dtype)
        for name, spec in dataset.element_spec.items()
    }
    done = 0
    with progress(total, "decoding images", "img") as bar:
        for batch in dataset.batch(_BATCH).prefetch(2).as_numpy_iterator():
            count = len(batch["image"])
            for name, values in batch.items():
                arrays[name][done : done + count] = values
            done += count
            bar.update(count)
    return {name: array[:done] for name, array in arrays.items()}


def as_tensor(array: np.ndarray) -> Any:
    """Make an eager tensor of an array, in the same memory where TensorFlow can use it."""
    tf = import_tensorflow()
    if array.size and array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % _ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.identity(tf.convert_to_tensor(array))  # the conversion alone keeps a second copy alive


def _empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array whose memory `as_tensor` can share, so that a data set is held once."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
