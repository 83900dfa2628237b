"""The order of the images: the one place that decides which image, and which way round, stands where in a run."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_PERMUTATION, _FLIPS, _FILES = 1, 2, 3  # tags that keep the random streams of an epoch apart

# epoch -> (order int64 [N], flips bool [N])
_Epochs = Callable[[int], tuple[np.ndarray, np.ndarray]]


def batch_indices(seed: int, step: int, batch_size: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of one global batch, as a pure function of its arguments.

    The run is one long line of positions. Position p = step * batch_size + i lies in epoch p // num_images; the
    epoch's permutation comes from (seed, epoch) and the flip from (seed, p). Batches straddle epochs and drop nothing,
    so `batch_size` may exceed `num_images`.

    Args:
        seed: of the run, >= 0.
        step: optimizer step, >= 0.
        batch_size: images in the global batch, B >= 1.
        num_images: images in the set, N >= 1.

    Returns:
        indices int64 [B] in 0 … N-1, and flips bool [B], true where the image is to be mirrored left to right.

    Raises:
        ValueError: an argument is out of its range.
    """
    return _cut(seed, step, batch_size, num_images, lambda epoch: _epoch(seed, epoch, num_images))


def stream_indices(
    seed: int, step: int, batch_size: int, file_sizes: tuple[int, ...], window: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `batch_indices`, in an order that suits files which are read from end to end.

    An epoch reads the files in an order that comes from (seed, epoch), and shuffles each `window` consecutive images
    among themselves: to serve an image, no more than its window must lie in memory. Where one window holds the whole
    set, the batches are those of `batch_indices`; the flips are so always.

    Args:
        seed, step, batch_size: as of `batch_indices`.
        file_sizes: images in each file, none of them 0; image 0 is the first of file 0, and so on.
        window: images that are shuffled together, >= 1.
    """

    def epoch_of(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return stream_epoch(seed, epoch, file_sizes, window).order, _epoch_flips(seed, epoch, sum(file_sizes))

    return _cut(seed, step, batch_size, sum(file_sizes), epoch_of)


class StreamEpoch(NamedTuple):
    """What is read in an epoch, and what is served; place i // window of both holds the same images."""

    files: np.ndarray  # int64 [F], in the order in which they are read
    line: np.ndarray  # int64 [N], the images as they are read
    order: np.ndarray  # int64 [N], the images as they are served


@functools.lru_cache(maxsize=4)
def stream_epoch(seed: int, epoch: int, file_sizes: tuple[int, ...], window: int) -> StreamEpoch:
    """The order of one epoch of `stream_indices`; read-only, because it is shared."""
    files = np.argsort(_random_bits(seed, epoch, _FILES, len(file_sizes)), kind="stable").astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(file_sizes)])
    line = np.concatenate([np.arange(starts[file], starts[file + 1]) for file in files])
    place = np.empty_like(line)
    place[line] = np.arange(len(line))
    # The bits are those of the images and not of their places, so that one window is the permutation of `_epoch`.
    order = np.lexsort((_random_bits(seed, epoch, _PERMUTATION, len(line)), place // window))
    for array in (files, line, order):
        array.flags.writeable = False
    return StreamEpoch(files, line, order)


def _cut(seed: int, step: int, batch_size: int, num_images: int, epoch_of: _Epochs) -> tuple[np.ndarray, np.ndarray]:
    """A batch out of the line of epochs."""
    if seed < 0 or step < 0 or batch_size < 1 or num_images < 1:
        raise ValueError(
            f"batch_indices needs seed, step >= 0 and batch_size, num_images >= 1, "
            f"got {seed=}, {step=}, {batch_size=}, {num_images=}"
        )
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // num_images, (stop - 1) // num_images + 1):
        here = slice(max(start - epoch * num_images, 0), stop - epoch * num_images)
        parts.append([whole[here] for whole in epoch_of(epoch)])
    indices, flips = (np.concatenate(part) for part in zip(*parts, strict=True))
    return indices, flips


@functools.lru_cache(maxsize=4)  # two consecutive epochs, for a training and an evaluation that run side by side
def _epoch(seed: int, epoch: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the permutation int64 [N] and the flips bool [N] of one epoch, read-only because they are shared."""
    order = np.argsort(_random_bits(seed, epoch, _PERMUTATION, num_images), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order, _epoch_flips(seed, epoch, num_images)


@functools.lru_cache(maxsize=4)
def _epoch_flips(seed: int, epoch: int, num_images: int) -> np.ndarray:
    words = _random_bits(seed, epoch, _FLIPS, -(-num_images // 64)).astype("<u8")
    flips = np.unpackbits(words.view(np.uint8), count=num_images).astype(bool)
    flips.flags.writeable = False
    return flips


def _random_bits(seed: int, epoch: int, tag: int, count: int) -> np.ndarray:
    # NEP 19 promises that the raw stream of a BitGenerator never changes; it promises nothing for
    # `Generator.permutation`, which could reorder a resumed run after an update of NumPy.
    return np.random.Philox(np.random.SeedSequence([seed, epoch, tag])).random_raw(count)
