"""The variational bound in bits a dimension: its terms, and all of them over the whole chain."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jax.tree_util import Partial

from ddpm_jax.diffusion.clipping import Clip, clipped, make_clip
from ddpm_jax.diffusion.compiling import compiled
from ddpm_jax.diffusion.listening import run_with_listener, tell
from ddpm_jax.diffusion.process import PREDICTIONS, posterior_variance, q_sample, unknown_prediction, x0_from
from ddpm_jax.diffusion.samplers import checked_key, network_output, noise_at
from ddpm_jax.diffusion.schedule import Schedule, beta_between, rates
from ddpm_jax.diffusion.variance import VARIANCES, model_log_variance

# Black and white of the images, and how many levels lie between them, both included.
BOUNDS, NUM_LEVELS = (-1.0, 1.0), 256


class Bound(NamedTuple):
    """An upper bound of -log2 p(x0), in bits a dimension, in its terms (Ho et al. 2020, eq. 5)."""

    prior: jax.Array  # [B], L_T
    per_step: jax.Array  # [T B]; L_t of eq. 5 for t = 1 .. T-1, and the decoder's L_0 at t = 0

    @property
    def total(self) -> jax.Array:
        """The bound itself, [B]."""
        return self.prior + self.per_step.sum(0)


def prior_term(schedule: Schedule, x0: jax.Array) -> jax.Array:
    """KL(q(x_T | x0) || N(0, I)) in bits a dimension, [B]: (alpha_bar (x0^2 - 1) - log(1 - alpha_bar)) / 2.

    Args:
        schedule: the noise schedule.
        x0: clean images [B ...].
    """
    alpha_bar = schedule.alpha_bars[-1]
    # Not by the table of 1 - alpha_bar, whose rounding at 1 is larger than this term.
    return _bits(0.5 * (alpha_bar * (x0**2 - 1) - jnp.log1p(-alpha_bar)))


def step_term(
    schedule: Schedule,
    x0: jax.Array,
    x0_hat: jax.Array,
    log_variance: jax.Array,
    t: jax.Array,
    *,
    bounds: tuple[Any, Any] = BOUNDS,
    num_levels: int = NUM_LEVELS,
) -> jax.Array:
    """The bound's term of step t in bits a dimension, [B]  (Ho et al. 2020, eq. 5).

    t > 0: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) of two Gaussians; t = 0: ``decoder_term``.

    Args:
        schedule: the noise schedule.
        x0: clean images [B ...].
        x0_hat: what the network makes of x_t, shaped as x0; the mean of p is the posterior's with it.
        log_variance: of p, from ``model_log_variance`` with t_prev = t - 1; broadcasts against x0.
        t: int32 [] or [B], 0 .. T-1.
        bounds, num_levels: see ``decoder_term``.
    """
    now, prev = rates(schedule, t, x0), rates(schedule, t - 1, x0)
    _, true_log_variance = posterior_variance(schedule, x0, t, t - 1)
    difference = prev.signal * beta_between(now, prev) / now.noise_level * (x0 - x0_hat)  # of the means
    log_ratio = true_log_variance - log_variance
    kl = 0.5 * (jnp.expm1(log_ratio) - log_ratio + difference**2 * jnp.exp(-log_variance))
    decoder = decoder_term(x0, x0_hat, log_variance, bounds=bounds, num_levels=num_levels)
    return jnp.where(t == 0, decoder, _bits(kl))


def decoder_term(
    x0: jax.Array,
    mean: jax.Array,
    log_variance: jax.Array,
    *,
    bounds: tuple[Any, Any] = BOUNDS,
    num_levels: int = NUM_LEVELS,
) -> jax.Array:
    """-log2 of the probability that a Gaussian gives to each pixel's bin, bits a dimension [B]  (eq. 13).

    A level's bin reaches half-way to its neighbours, the first and the last one to infinity. It is the probability of a
    level and not a density, so that images in other units (``bounds``) need no log-determinant.

    Args:
        x0: clean images [B ...], each pixel one of the levels.
        mean: shaped as x0.
        log_variance: broadcasts against x0.
        bounds: the least and the greatest level; numbers, or arrays that broadcast against x0.
        num_levels: 256 for images of 8 bits.
    """
    low, high = bounds
    half = 0.5 * (high - low) / (num_levels - 1)
    scale = jnp.exp(-0.5 * log_variance)
    away = x0 - mean
    # The tail in which the bin lies farther out is the one where differences of probabilities are exact.
    near, far = (log_ndtr((-jnp.abs(away) + side) * scale) for side in (half, -half))
    inside = near + jnp.log(jnp.maximum(-jnp.expm1(far - near), 1e-30))
    first, last = log_ndtr((away + half) * scale), log_ndtr((half - away) * scale)
    log_probability = jnp.where(x0 < low + half, first, jnp.where(x0 > high - half, last, inside))
    return _bits(-log_probability)


def variational_bound(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    x0: jax.Array,
    key: jax.Array,
    *,
    variance: str = "fixed_small",
    prediction: str = "eps",
    clip_x0: bool | tuple[Any, Any] = True,
    bounds: tuple[Any, Any] = BOUNDS,
    num_levels: int = NUM_LEVELS,
    chunk: int = 1,
    on_step: Callable[[int], object] | None = None,
    compiler_options: Mapping[str, str] | None = None,
) -> Bound:
    """A bound on -log2 p(x0) in bits a dimension, from one draw of x_t at every t, inside one compiled loop.

    -log2 p(x0) <= prior + sum over t of ``step_term``  (Ho et al. 2020, eq. 5; unbiased for the bound's own mean).

    Args:
        denoise_fn: ``denoise_fn(x_t, t)``, as in ``sample``.
        schedule: the noise schedule.
        x0: clean images [B H W C], each pixel one of the levels.
        key: one key, or B keys, one an image; the noise of x_t is drawn from ``fold_in(key, t)``.
        variance: "fixed_small", "fixed_large" or, where the network learned one, "learned".
        prediction: what the network predicts: "eps", "x0" or "v".
        clip_x0: clip x0_hat to [-1, 1] (True), to a pair of bounds, or not at all (False).
        bounds, num_levels: of the levels, see ``decoder_term``.
        chunk: timesteps in one network call; B times as many images.
        on_step: called with 0, 1, .. as each of the ceil(T / chunk) chunks ends; see ``sample``.
        compiler_options: see ``sample``.

    Raises:
        ValueError: an argument is out of range; the message names it and the remedy.
    """
    if variance not in VARIANCES:
        raise ValueError(f"sampling.variance={variance!r}: choose one of {', '.join(VARIANCES)}")
    if prediction not in PREDICTIONS:
        raise unknown_prediction(prediction)
    if not 1 <= chunk <= schedule.num_timesteps:
        raise ValueError(f"chunk={chunk}: must lie in 1 .. {schedule.num_timesteps}, the timesteps of the schedule")
    x0 = jnp.asarray(x0, jnp.float32)
    run = functools.partial(
        _run_bound(compiler_options),
        denoise_fn if isinstance(denoise_fn, Partial) else Partial(denoise_fn),
        schedule,
        x0,
        checked_key(key, x0.shape[0]),
        make_clip(clip_x0, None, None, x0.shape),
        tuple(jnp.asarray(bound, jnp.float32) for bound in bounds),
        variance=variance,
        prediction=prediction,
        num_levels=num_levels,
        chunk=chunk,
    )
    return run(listener=None) if on_step is None else run_with_listener(run, on_step)


@compiled("variance", "prediction", "num_levels", "chunk")
def _run_bound(
    denoise_fn: Partial,
    schedule: Schedule,
    x0: jax.Array,
    key: jax.Array,
    clip: Clip | None,
    bounds: tuple[jax.Array, jax.Array],
    *,
    listener: jax.Array | None,
    variance: str,
    prediction: str,
    num_levels: int,
    chunk: int,
) -> Bound:
    def term(t: jax.Array) -> jax.Array:
        x_t = q_sample(schedule, x0, t, noise_at(key, t, x0))
        output, variance_output = network_output(denoise_fn, x_t, t)
        x0_hat = clipped(x0_from(prediction, schedule, output, x_t, t), clip)
        log_variance = model_log_variance(variance, schedule, x_t, t, t - 1, variance_output)
        return step_term(schedule, x0, x0_hat, log_variance, t, bounds=bounds, num_levels=num_levels)

    def terms(_: None, i: jax.Array) -> tuple[None, jax.Array]:
        # What the last chunk has too many repeats the last timestep, and is cut off below.
        t = jnp.minimum(i * chunk + jnp.arange(chunk), schedule.num_timesteps - 1)
        found = jax.vmap(term)(t)
        tell(listener, i)
        return None, found

    _, per_step = jax.lax.scan(terms, None, jnp.arange(-(-schedule.num_timesteps // chunk)))
    return Bound(prior_term(schedule, x0), per_step.reshape(-1, x0.shape[0])[: schedule.num_timesteps])


def _bits(nats: jax.Array) -> jax.Array:
    """Mean over the dimensions of each example, in bits."""
    return nats.mean(tuple(range(1, nats.ndim))) / math.log(2)
