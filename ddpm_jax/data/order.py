"""The order of the images: the one place that decides which image, and which way round, stands where in a run."""

import functools

import numpy as np

_PERMUTATION, _FLIPS = 1, 2  # tags that keep the two random streams of an epoch apart


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
    if seed < 0 or step < 0 or batch_size < 1 or num_images < 1:
        raise ValueError(
            f"batch_indices needs seed, step >= 0 and batch_size, num_images >= 1, "
            f"got {seed=}, {step=}, {batch_size=}, {num_images=}"
        )
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // num_images, (stop - 1) // num_images + 1):
        here = slice(max(start - epoch * num_images, 0), stop - epoch * num_images)
        parts.append([whole[here] for whole in _epoch(seed, epoch, num_images)])
    indices, flips = (np.concatenate(part) for part in zip(*parts, strict=True))
    return indices, flips


@functools.lru_cache(maxsize=4)  # two consecutive epochs, for a training and an evaluation that run side by side
def _epoch(seed: int, epoch: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the permutation int64 [N] and the flips bool [N] of one epoch, read-only because they are shared."""
    order = np.argsort(_random_bits(seed, epoch, _PERMUTATION, num_images), kind="stable").astype(np.int64)
    words = _random_bits(seed, epoch, _FLIPS, -(-num_images // 64)).astype("<u8")
    flips = np.unpackbits(words.view(np.uint8), count=num_images).astype(bool)
    order.flags.writeable = flips.flags.writeable = False
    return order, flips


def _random_bits(seed: int, epoch: int, tag: int, count: int) -> np.ndarray:
    # NEP 19 promises that the raw stream of a BitGenerator never changes; it promises nothing for
    # `Generator.permutation`, which could reorder a resumed run after an update of NumPy.
    return np.random.Philox(np.random.SeedSequence([seed, epoch, tag])).random_raw(count)
