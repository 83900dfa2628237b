"""The variance of a reverse step: one of two fixed ones, or between them, as the network says."""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.process import posterior_variance
from ddpm_jax.diffusion.schedule import Schedule, beta_between, rates

VARIANCES = ("fixed_small", "fixed_large", "learned")


def model_log_variance(
    variance: str,
    schedule: Schedule,
    x_t: jax.Array,
    t: jax.Array,
    t_prev: jax.Array,
    variance_output: jax.Array | None = None,
) -> jax.Array:
    """log sigma^2 of p(x_prev | x_t), which broadcasts against x_t; finite everywhere.

    fixed_small: the posterior's, (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta; to clean data that of the step 1 -> 0.
    fixed_large: beta = 1 - alpha_bar_t / alpha_bar_prev; to clean data fixed_small (both as in Ho's code).
    learned: v log beta + (1 - v) fixed_small, v = (variance_output + 1) / 2  (Nichol & Dhariwal 2021, eq. 15; the
    network's range is -1 .. 1, as in their code and diffusers' "learned_range").

    Args:
        variance: "fixed_small", "fixed_large" or "learned".
        schedule: the noise schedule.
        x_t: noisy images [B ...].
        t: int32 [] or [B], 0 .. T-1.
        t_prev: int32 like t, -1 .. t-1.
        variance_output: the second half of the network's channels, shaped as x_t; for "learned".
    """
    check_variance(variance, variance_output is not None)
    now, prev = rates(schedule, t, x_t), rates(schedule, t_prev, x_t)
    _, small = posterior_variance(schedule, x_t, t, t_prev)
    if variance == "fixed_small":
        return small
    large = jnp.log(beta_between(now, prev))
    if variance == "fixed_large":
        return jnp.where(prev.noise_level > 0, large, small)
    assert variance_output is not None
    v = (variance_output + 1) / 2
    return v * large + (1 - v) * small


def check_variance(variance: str, learned: bool) -> None:
    """Raises ValueError for an unknown variance, or for "learned" where the network has learned none."""
    if variance not in VARIANCES:
        raise ValueError(f"sampling.variance={variance!r}: choose one of {', '.join(VARIANCES)}")
    if variance == "learned" and not learned:
        raise ValueError(
            "sampling.variance='learned': the network has no output for it; train one with diffusion.learned_variance, "
            "or use fixed_small"
        )


def split_output(output: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(prediction, variance output) of a network: the two halves of its channels, or all of them and None.

    Raises:
        ValueError: the output has neither the channels of the images nor twice as many.
    """
    if output.shape == x_t.shape:
        return output, None
    if output.shape != (*x_t.shape[:-1], 2 * x_t.shape[-1]):
        raise ValueError(
            f"denoise_fn: returned {output.shape} for images {x_t.shape}; the two must be alike, or the output have "
            "twice the channels, the second half for a learned variance"
        )
    prediction, variance_output = jnp.split(output, 2, axis=-1)
    return prediction, variance_output
