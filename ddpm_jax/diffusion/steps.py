"""One step of each method, from x_t to x_prev, and the table of the methods."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.process import posterior
from ddpm_jax.diffusion.schedule import Schedule, beta_between, rates
from ddpm_jax.diffusion.variance import model_log_variance


def ddpm_step(
    schedule: Schedule,
    x0_hat: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    t_prev: jax.Array,
    noise: jax.Array,
    *,
    variance: str = "fixed_small",
    variance_output: jax.Array | None = None,
) -> jax.Array:
    """x_prev ~ N(posterior mean of (x0_hat, x_t), sigma^2)  (Ho et al. 2020, algorithm 2; ancestral sampling).

    fixed_small: sigma^2 = (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta, the posterior's variance.
    fixed_large: sigma^2 = beta = 1 - alpha_bar_t / alpha_bar_prev; what Ho et al. used for CIFAR-10.
    learned: between the two, as the network says; see ``model_log_variance``.
    No noise is added in the step to clean data, t_prev = -1.

    Args:
        schedule: the noise schedule.
        x0_hat: predicted clean images [B ...].
        x_t: noisy images, shaped as x0_hat.
        t: int32 [] or [B], 0 .. T-1.
        t_prev: int32 like t, -1 .. t-1.
        noise: standard normal, shaped as x_t.
        variance: "fixed_small", "fixed_large" or "learned".
        variance_output: the second half of the network's channels, shaped as x_t; for "learned".
    """
    mean, _, _ = posterior(schedule, x0_hat, x_t, t, t_prev)
    std = jnp.exp(0.5 * model_log_variance(variance, schedule, x_t, t, t_prev, variance_output))
    return mean + jnp.where(rates(schedule, t_prev, x_t).noise_level > 0, std, 0.0) * noise


def ddim_step(
    schedule: Schedule,
    x0_hat: jax.Array,
    eps_hat: jax.Array,
    t: jax.Array,
    t_prev: jax.Array,
    noise: jax.Array,
    *,
    eta: float | jax.Array = 0.0,
) -> jax.Array:
    """x_prev = sqrt(alpha_bar_prev) x0_hat + sqrt(1 - alpha_bar_prev - sigma^2) eps_hat + sigma noise.

    sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)
    (Song et al. 2021, eq. 12 and 16). eta = 0 is deterministic, eta = 1 is DDPM with ``fixed_small``.

    Args:
        schedule: the noise schedule.
        x0_hat: predicted clean images [B ...].
        eps_hat: predicted noise, shaped as x0_hat.
        t: int32 [] or [B], 0 .. T-1.
        t_prev: int32 like t, -1 .. t-1.
        noise: standard normal, shaped as x0_hat.
        eta: 0 .. 1.
    """
    now, prev = rates(schedule, t, x0_hat), rates(schedule, t_prev, x0_hat)
    sigma2 = eta**2 * prev.noise_level / now.noise_level * beta_between(now, prev)
    # 1 - alpha_bar_prev - sigma^2 as a sum of positive terms: the difference cancels on long steps with eta = 1.
    kept = now.alpha_bar / prev.alpha_bar * prev.noise_level / now.noise_level
    direction = jnp.sqrt(prev.noise_level * (1 - eta**2 + eta**2 * kept))
    return prev.signal * x0_hat + direction * eps_hat + jnp.sqrt(sigma2) * noise


def exponential_step(
    schedule: Schedule, x0_hat: jax.Array, x_t: jax.Array, t: jax.Array, t_prev: jax.Array
) -> jax.Array:
    """x_prev = (sigma' / sigma) x_t + alpha' (1 - e^-h) x0_hat  (Lu et al. 2022b, eq. 9 with x0_hat held still).

    alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), primed at t_prev; lambda = log(alpha / sigma), half the
    log-SNR; h = lambda' - lambda. It is DDIM with eta = 0 in x0_hat alone. As alpha' e^-h = alpha sigma' / sigma it
    needs no logarithm and holds at both ends, alpha = 0 and sigma' = 0.

    Args:
        schedule: the noise schedule.
        x0_hat: predicted clean images [B ...].
        x_t: noisy images, shaped as x0_hat.
        t: int32 [] or [B], 0 .. T-1.
        t_prev: int32 like t, -1 .. t-1.
    """
    now, prev = rates(schedule, t, x_t), rates(schedule, t_prev, x_t)
    shrunk = prev.noise / now.noise
    return shrunk * x_t + (prev.signal - now.signal * shrunk) * x0_hat


def dpmpp_step(
    schedule: Schedule,
    x0_hat: jax.Array,
    x0_hat_last: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    t_prev: jax.Array,
    t_last: jax.Array,
) -> jax.Array:
    """DPM-Solver++ 2M: ``exponential_step`` with x0_hat extrapolated in lambda  (Lu et al. 2022b, algorithm 2).

    D = x0_hat + h / (2 h_last) (x0_hat - x0_hat_last), h = lambda_prev - lambda_t, h_last = lambda_t - lambda_last.
    Where there is nothing to extrapolate from or to it is first order, D = x0_hat: in the first step (t_last = t),
    after a level without signal (h_last infinite) and in the step to clean data (h infinite).

    Args:
        schedule: the noise schedule.
        x0_hat: predicted clean images [B ...] at t.
        x0_hat_last: those of the step before, at t_last.
        x_t: noisy images, shaped as x0_hat.
        t: int32 [] or [B], 0 .. T-1.
        t_prev: int32 like t, -1 .. t-1.
        t_last: int32 like t, t .. T-1; t itself where there was no step before.
    """
    half_log_snr, half_log_snr_prev, half_log_snr_last = (_half_log_snr(schedule, s, x_t) for s in (t, t_prev, t_last))
    h, h_last = half_log_snr_prev - half_log_snr, half_log_snr - half_log_snr_last
    usable = (h_last > 0) & jnp.isfinite(h_last) & jnp.isfinite(h)
    extrapolation = jnp.where(usable, 0.5 * h, 0.0) / jnp.where(usable, h_last, 1.0)
    return exponential_step(schedule, x0_hat + extrapolation * (x0_hat - x0_hat_last), x_t, t, t_prev)


def heun_step(
    guess_x0: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    x0_hat: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    t_prev: jax.Array,
) -> jax.Array:
    """x_prev = (sigma' / sigma) x_t + alpha' (1 - e^-h) (x0_hat + x0_hat') / 2, x0_hat' guessed at the DDIM step's end.

    Heun's method for the probability flow, exponential in lambda as DPM-Solver++ is, with the trapezoid as its second
    stage (Karras et al. 2022, algorithm 1, has it in sigma). To clean data, where the network has no level to be told,
    it is the DDIM step, and costs no second call. Letters as in ``exponential_step``.

    Args:
        guess_x0: ``guess_x0(x, t)``, the second network call.
        schedule: the noise schedule.
        x0_hat: predicted clean images [B ...] at t.
        x_t: noisy images, shaped as x0_hat.
        t: int32 [], 0 .. T-1.
        t_prev: int32 [], -1 .. t-1.
    """
    x_ddim = exponential_step(schedule, x0_hat, x_t, t, t_prev)

    def corrected() -> jax.Array:
        mean_x0_hat = (x0_hat + guess_x0(x_ddim, t_prev)) / 2
        return exponential_step(schedule, mean_x0_hat, x_t, t, t_prev)

    return jax.lax.cond(t_prev >= 0, corrected, lambda: x_ddim)


class Guess(NamedTuple):
    """What a network's output at one level says."""

    x0_hat: jax.Array  # [B H W C], clipped where the chain clips
    eps_hat: jax.Array  # [B H W C]
    variance_output: jax.Array | None  # [B H W C] where the network learned the variance


class Moment(NamedTuple):
    """All that a method may take a step from; most use less, and what is not used costs nothing."""

    schedule: Schedule
    x_t: jax.Array
    t: jax.Array  # int32 []
    t_prev: jax.Array  # int32 []
    guess: Guess  # at (x_t, t)
    x0_hat_last: jax.Array  # of the step before; zeros in the first
    t_last: jax.Array  # of the step before; t in the first
    guess_at: Callable[[jax.Array, jax.Array], Guess]  # one more network call
    noise: Callable[[], jax.Array]  # drawn for t
    eta: jax.Array
    variance: str


def _half_log_snr(schedule: Schedule, t: jax.Array, x: jax.Array) -> jax.Array:
    now = rates(schedule, t, x)
    return 0.5 * (jnp.log(now.alpha_bar) - jnp.log(now.noise_level))


def _ddim(m: Moment) -> jax.Array:
    return ddim_step(m.schedule, m.guess.x0_hat, m.guess.eps_hat, m.t, m.t_prev, m.noise(), eta=m.eta)


def _ddpm(m: Moment) -> jax.Array:
    return ddpm_step(
        m.schedule,
        m.guess.x0_hat,
        m.x_t,
        m.t,
        m.t_prev,
        m.noise(),
        variance=m.variance,
        variance_output=m.guess.variance_output,
    )


def _dpmpp(m: Moment) -> jax.Array:
    return dpmpp_step(m.schedule, m.guess.x0_hat, m.x0_hat_last, m.x_t, m.t, m.t_prev, m.t_last)


def _heun(m: Moment) -> jax.Array:
    return heun_step(lambda x, t: m.guess_at(x, t).x0_hat, m.schedule, m.guess.x0_hat, m.x_t, m.t, m.t_prev)


# A new method is a function and a line here.
STEPS: dict[str, Callable[[Moment], jax.Array]] = {"ddim": _ddim, "ddpm": _ddpm, "dpm++": _dpmpp, "heun": _heun}
METHODS = tuple(STEPS)
