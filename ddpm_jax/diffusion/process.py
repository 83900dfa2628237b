"""The forward process, its posterior, and the conversions between x0, eps and v."""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.schedule import Schedule, beta_between, rates

PREDICTIONS = ("eps", "x0", "v")


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps  (Ho et al. 2020, eq. 4).

    Args:
        schedule: the noise schedule.
        x0: clean images [B ...].
        t: int32 [] or [B], 0 .. T-1.
        eps: standard normal noise, shaped as x0.
    """
    now = rates(schedule, t, x0)
    return now.signal * x0 + now.noise * eps


def posterior(
    schedule: Schedule, x0: jax.Array, x_t: jax.Array, t: jax.Array, t_prev: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q(x_prev | x_t, x0) for any t_prev < t  (Ho et al. 2020, eq. 6-7, with beta = 1 - alpha_bar_t / alpha_bar_prev).

    mean = (sqrt(alpha_bar_prev) beta x0 + sqrt(1 - beta) (1 - alpha_bar_prev) x_t) / (1 - alpha_bar_t)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta

    Args:
        schedule: the noise schedule.
        x0: clean images [B ...].
        x_t: noisy images, shaped as x0.
        t: int32 [] or [B], 0 .. T-1.
        t_prev: int32 like t, -1 .. t-1; -1 is clean data, where the variance is 0.

    Returns:
        (mean [B ...], variance, log_variance); the last two broadcast against x0. log_variance is finite: where the
        variance is 0 it is that of the step 1 -> 0, as in Ho's code (-9.82 for the linear schedule at T = 1000).
    """
    now, prev = rates(schedule, t, x_t), rates(schedule, t_prev, x_t)
    beta = beta_between(now, prev)
    mean = (
        prev.signal * beta / now.noise_level * x0 + now.signal / prev.signal * prev.noise_level / now.noise_level * x_t
    )
    return mean, *posterior_variance(schedule, x_t, t, t_prev)


def posterior_variance(
    schedule: Schedule, x_t: jax.Array, t: jax.Array, t_prev: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(variance, log_variance) of ``posterior``, which do not depend on x0; they broadcast against x_t."""
    now, prev = rates(schedule, t, x_t), rates(schedule, t_prev, x_t)
    variance = prev.noise_level / now.noise_level * beta_between(now, prev)
    levels = schedule.noise_levels
    floor = levels[0] / levels[1] * schedule.betas[1] if schedule.num_timesteps > 1 else 1e-20
    return variance, jnp.log(jnp.where(variance == 0, floor, variance))


def x0_from(prediction: str, schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """x0 from a network output that predicts ``prediction``: "eps", "x0" or "v".

    eps: (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)  (Ho et al. 2020, eq. 15)
    v:   sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v  (Salimans & Ho 2022, appendix D)

    Where alpha_bar = 0 (zero terminal SNR), eps says nothing of x0: the answer is NaN. The other two are exact there.

    Args:
        prediction: what ``output`` is.
        schedule: the noise schedule.
        output: [B ...].
        x_t: noisy images, shaped as output.
        t: int32 [] or [B], 0 .. T-1.
    """
    now = rates(schedule, t, x_t)
    if prediction == "x0":
        return output
    if prediction == "eps":
        # Not the infinity that division gives: clipping would make an image of it.
        return jnp.where(now.signal > 0, (x_t - now.noise * output) / now.signal, jnp.nan)
    if prediction == "v":
        return now.signal * x_t - now.noise * output
    raise unknown_prediction(prediction)


def eps_from(prediction: str, schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """eps from a network output that predicts ``prediction``; arguments as in ``x0_from``.

    x0: (x_t - sqrt(alpha_bar) x0) / sqrt(1 - alpha_bar)
    v:  sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v
    """
    now = rates(schedule, t, x_t)
    if prediction == "eps":
        return output
    if prediction == "x0":
        return (x_t - now.signal * output) / now.noise
    if prediction == "v":
        return now.noise * x_t + now.signal * output
    raise unknown_prediction(prediction)


def v_from(prediction: str, schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 from a network output that predicts ``prediction``.

    Arguments as in ``x0_from``. With x_t and one of the two known, v needs one division only:
    eps: (eps - sqrt(1 - alpha_bar) x_t) / sqrt(alpha_bar);  x0: (sqrt(alpha_bar) x_t - x0) / sqrt(1 - alpha_bar)
    As in ``x0_from``, eps gives NaN where alpha_bar = 0.
    """
    now = rates(schedule, t, x_t)
    if prediction == "v":
        return output
    if prediction == "eps":
        return jnp.where(now.signal > 0, (output - now.noise * x_t) / now.signal, jnp.nan)
    if prediction == "x0":
        return (now.signal * x_t - output) / now.noise
    raise unknown_prediction(prediction)


def unknown_prediction(prediction: str) -> ValueError:
    """The error for a prediction that is none."""
    return ValueError(f"diffusion.prediction={prediction!r}: choose one of {', '.join(PREDICTIONS)}")
