"""What a sampler does to a predicted clean image that leaves the range of images: clip it, or threshold it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Clip(NamedTuple):
    """Bounds of x0_hat and, for dynamic thresholding, the quantile and its cap; arrays, so that none compiles anew."""

    low: jax.Array
    high: jax.Array
    quantile: jax.Array | None = None
    max_threshold: jax.Array | None = None


def make_clip(
    clip_x0: Any, dynamic_threshold: float | None, max_threshold: float | None, shape: tuple[int, ...]
) -> Clip | None:
    """The arguments of ``sample`` as arrays, checked; None where nothing is clipped."""
    bounds = _checked_bounds(clip_x0, shape)
    check_thresholds(bounds is not None, dynamic_threshold, max_threshold)
    if bounds is None:
        return None
    if dynamic_threshold is None:
        return Clip(*bounds)
    cap = np.inf if max_threshold is None else max_threshold
    return Clip(*bounds, jnp.asarray(dynamic_threshold, jnp.float32), jnp.asarray(cap, jnp.float32))


def check_thresholds(clips: bool, dynamic_threshold: float | None, max_threshold: float | None) -> None:
    """Raises ValueError where dynamic thresholding cannot be as asked; without JAX, so that a config can be checked."""
    if dynamic_threshold is None:
        if max_threshold is not None:
            raise ValueError(f"sampling.max_threshold={max_threshold}: caps sampling.dynamic_threshold; set that too")
        return
    if not clips:
        raise ValueError(f"sampling.dynamic_threshold={dynamic_threshold}: moves the bounds of clip_x0; switch it on")
    if not 0 < dynamic_threshold <= 1:
        raise ValueError(f"sampling.dynamic_threshold={dynamic_threshold}: must lie in (0, 1]; Imagen's is 0.995")
    if max_threshold is not None and not max_threshold > 1:
        raise ValueError(f"sampling.max_threshold={max_threshold}: must exceed 1, which is plain clipping; use 1.5")


def clipped(x0_hat: jax.Array, clip: Clip | None) -> jax.Array:
    """x0_hat within the bounds of ``clip``, thresholded where it says so; the same x0_hat for None."""
    if clip is None:
        return x0_hat
    if clip.quantile is None:
        return jnp.clip(x0_hat, clip.low, clip.high)
    centre, half_range = (clip.low + clip.high) / 2, (clip.high - clip.low) / 2
    x0_hat = (x0_hat - centre) / half_range
    return centre + half_range * threshold(x0_hat, clip.quantile, clip.max_threshold)


def threshold(
    x0_hat: jax.Array, quantile: float | jax.Array, max_threshold: float | jax.Array | None = None
) -> jax.Array:
    """Dynamic thresholding: x0_hat clipped to [-s, s] and divided by s (Saharia et al. 2022, Imagen, section 2.3).

    s is the ``quantile`` of |x0_hat| over each image, at least 1 and at most ``max_threshold``: few pixels saturate
    where guidance drives many of them out of [-1, 1].

    Args:
        x0_hat: predicted clean images [B ...], of the range [-1, 1].
        quantile: 0 .. 1; Imagen's is 0.995.
        max_threshold: the cap of s, diffusers' ``sample_max_value``; None is none, as in Imagen.
    """
    s = jnp.quantile(jnp.abs(x0_hat).reshape(x0_hat.shape[0], -1), quantile, axis=1)
    s = jnp.clip(s, 1.0, max_threshold).reshape(-1, *(1,) * (x0_hat.ndim - 1))
    return jnp.clip(x0_hat, -s, s) / s


def _checked_bounds(clip_x0: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array] | None:
    """Float32 arrays, so that no number or array of another type compiles the chain again."""
    if isinstance(clip_x0, bool | np.bool_):
        clip_x0 = (-1.0, 1.0) if clip_x0 else None
    if clip_x0 is None:
        return None
    if not isinstance(clip_x0, tuple | list) or len(clip_x0) != 2:
        raise ValueError(f"clip_x0={clip_x0!r}: must be a bool or a pair of bounds")
    low, high = (jnp.asarray(bound, jnp.float32) for bound in clip_x0)
    for bound in (low, high):
        if np.broadcast_shapes(bound.shape, shape) != shape:
            raise ValueError(f"clip_x0: a bound of shape {bound.shape} does not broadcast to the images {shape}")
    if (
        not isinstance(low, jax.core.Tracer)
        and not isinstance(high, jax.core.Tracer)
        and not bool(jnp.all(low <= high))
    ):
        raise ValueError(f"clip_x0={clip_x0!r}: the lower bound comes first")
    return low, high
