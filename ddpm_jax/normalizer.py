"""x0 = (x - mean) / std of images x in [-1, 1], channel by channel, and the way back.

A normaliser is two tuples of numbers, one a channel, or one for all.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import images

NORMALIZERS = ("none", "mean_std")
_CHUNK = 1024  # images counted at a time: their pixels are widened to int64


class Normalizer(NamedTuple):
    """Mean and standard deviation of images in [-1, 1]."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


IDENTITY = Normalizer()


def measure(pixels: np.ndarray) -> Normalizer:
    """The mean and the standard deviation of each channel of uint8 images [N H W C], in [-1, 1].

    From counts of the 256 levels, so the numbers are the same whatever the order of the images.

    Raises:
        ValueError: a channel that is the same everywhere.
    """
    levels = np.arange(256) / 127.5 - 1
    mean, std = [], []
    for channel in range(pixels.shape[-1]):
        chunks = (pixels[i : i + _CHUNK, ..., channel] for i in range(0, len(pixels), _CHUNK))
        counts = sum(np.bincount(chunk.ravel(), minlength=256) for chunk in chunks)
        share = counts / np.sum(counts)
        mean.append(float(share @ levels))
        std.append(math.sqrt(share @ (levels - mean[-1]) ** 2))
        if np.count_nonzero(counts) < 2:
            raise ValueError(f"data.normalizer='mean_std': channel {channel} is the same in all images; use none")
    return Normalizer(tuple(mean), tuple(std))


def normalize(normalizer: Normalizer, pixels: np.ndarray | jax.Array) -> jax.Array:
    """uint8 images [... C] -> x0, float32; under ``jit`` too."""
    return (images.to_float(pixels) - jnp.float32(normalizer.mean)) / jnp.float32(normalizer.std)


def denormalize(normalizer: Normalizer, x0: jax.Array) -> jax.Array:
    """x0 [... C] -> uint8 images, the exact inverse of ``normalize``; what lies outside black and white is clipped."""
    return images.to_uint8(x0 * jnp.float32(normalizer.std) + jnp.float32(normalizer.mean))


def clip_bounds(normalizer: Normalizer, clip_range: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """What the colours -clip_range and clip_range are in x0, float64 [C] each: black and white by default."""
    mean, std = np.asarray(normalizer.mean), np.asarray(normalizer.std)
    return (-clip_range - mean) / std, (clip_range - mean) / std


def log_abs_det(normalizer: Normalizer, shape: Sequence[int]) -> float:
    """log|det dx0/dx| of one image of ``shape`` [H W C]: - H W sum_c log std_c, in nats.

    For densities: log p(x) = log p(x0) + log_abs_det. The probability of a level of gray, as in the decoder term of the
    variational bound, is the same in both units and needs ``clip_bounds`` alone, which tell how wide a level is.
    """
    *_, channels = shape
    return -math.prod(shape) / channels * float(np.broadcast_to(np.log(normalizer.std), channels).sum())


def check(kind: str, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Refuses numbers that are no normaliser; with "mean_std", none are as good as all: they are measured later.

    Raises:
        ValueError: one line that names the field, the value and the remedy.
    """
    for field, values in (("mean", mean), ("std", std)):
        if kind == "none" and values:
            raise ValueError(f"data.{field}={tuple(values)}: is of data.normalizer='mean_std'; choose that, or use ()")
    if len(mean) not in (0, channels) or len(mean) != len(std):
        raise ValueError(
            f"data.mean={tuple(mean)}, data.std={tuple(std)}: need one number for each of the {channels} channels, or "
            "() in both, which are then measured"
        )
    if not all(0 < x < math.inf for x in std):
        raise ValueError(f"data.std={tuple(std)}: must be positive")
    if not all(map(math.isfinite, mean)):
        raise ValueError(f"data.mean={tuple(mean)}: must be finite")
