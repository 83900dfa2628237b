"""The reverse process: the one lax.scan that runs any method, and what it is asked for."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddpm_jax.diffusion.clipping import Clip, clipped, make_clip
from ddpm_jax.diffusion.compiling import compiled
from ddpm_jax.diffusion.listening import run_with_listener, tell
from ddpm_jax.diffusion.process import PREDICTIONS, eps_from, x0_from
from ddpm_jax.diffusion.schedule import Schedule, ScheduleWarning
from ddpm_jax.diffusion.spacing import spaced
from ddpm_jax.diffusion.steps import METHODS, STEPS, Guess, Moment
from ddpm_jax.diffusion.variance import VARIANCES, split_output


class Trajectory(NamedTuple):
    """K steps of a chain, noisy to clean: the timestep, the image that the network saw, and the x0 that it guessed."""

    t: jax.Array  # int32 [K]
    x_t: jax.Array  # [K B H W C]
    x0_hat: jax.Array  # [K B H W C], clipped where the chain clips


def sample(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    x_T: jax.Array,
    key: jax.Array,
    *,
    method: str = "ddim",
    num_steps: int = 50,
    spacing: str = "leading",
    plan: tuple[np.ndarray, np.ndarray] | None = None,
    eta: float | jax.Array = 0.0,
    variance: str = "fixed_small",
    prediction: str = "eps",
    clip_x0: bool | tuple[Any, Any] = True,
    dynamic_threshold: float | None = None,
    max_threshold: float | None = None,
    rederive_eps: bool = True,
    trajectory: int = 0,
    on_step: Callable[[int], object] | None = None,
    compiler_options: Mapping[str, str] | None = None,
) -> Any:
    """Runs a chain from x_T to x0 inside one compiled ``lax.scan``.

    The function is jitted itself. It compiles anew for another ``denoise_fn``, shape, number of steps, trajectory or
    choice by name or switch, and not for other weights, schedules, timesteps, keys, eta or clip bounds, which are
    arguments of the program.

    Args:
        denoise_fn: ``denoise_fn(x_t, t)``, [B H W C] float32 and int32 [B] -> [B H W C] (or 2C: see variance), called
            once a step (heun: twice). A plain function is static, cached by identity: define it once.
            ``jax.tree_util.Partial(f, params)`` passes its leaves as arguments.
        schedule: the noise schedule.
        x_T: the start, float32 [B H W C]: standard normal noise. Its sharding is that of the chain.
        key: one key, or B keys, one an image; then image i depends on x_T[i] and key[i] alone. A step's noise is drawn
            from ``fold_in(key, t)``, so two chains with the same key meet the same noise at the same t.
        method: "ddim", "ddpm" (ancestral sampling), or, of second order and without noise, "dpm++" (DPM-Solver++ 2M)
            or "heun". A dpm++ chain begins with a first-order step, so that one cut in two is not the whole.
        num_steps: S. Network calls too, but for heun: its S steps to clean data are 2 S - 1 calls.
        spacing: which timesteps, see ``timestep_plan``.
        plan: ``(t, t_prev)``, int [S] each, in place of num_steps and spacing; t_prev < t (or t_prev = t = 0), -1 is
            clean data. The last t_prev need not be -1: the chain then stops at that noise level.
        eta: 0 .. 1, the noise of DDIM; 0 ignores the key. Other methods have none and refuse it.
        variance: "fixed_small", "fixed_large" or "learned", for DDPM. The last needs a network with twice the
            channels of the images, whose second half it is; every other method leaves that half alone.
        prediction: what the network predicts: "eps", "x0" or "v".
        clip_x0: clip x0_hat to [-1, 1] (True), to a pair of bounds that broadcast against x_T, or not at all (False).
        dynamic_threshold: q in (0, 1]: the bounds of clip_x0 move out to the q-quantile of |x0_hat| of each image, and
            x0_hat is scaled back (Saharia et al. 2022; their q is 0.995). See ``threshold``.
        max_threshold: a cap of how far they move, in units of the bounds, > 1; None is none.
        rederive_eps: DDIM takes eps_hat from the clipped x0_hat, so that x_t stays consistent with both; False keeps
            the network's own eps, as diffusers does by default.
        trajectory: K > 0 also returns K evenly chosen steps of the chain; the first among them, and the last if K > 1.
        on_step: called with 0 .. S-1 from inside the scan as each step ends, for a progress bar. The call then returns
            when the chain is done instead of at once.
        compiler_options: of ``jax.jit``, for XLA; none inside another jit.

    Returns:
        x0 [B H W C] float32, or ``(x0, Trajectory)`` where trajectory > 0.

    Raises:
        ValueError: an argument is out of range or does not fit the others; the message names it and the remedy.
    """
    _check_choices(method, eta, variance, prediction)
    t, t_prev = checked_plan(schedule, num_steps, spacing, plan)
    if not 0 <= trajectory <= len(t):
        raise ValueError(f"trajectory={trajectory}: must lie in 0 .. {len(t)}, the number of steps")
    _check_signal(schedule, prediction, int(t[0]))
    x_T = jnp.asarray(x_T, jnp.float32)
    if on_step is not None and isinstance(x_T, jax.core.Tracer):
        raise ValueError("on_step: inside another jit the chain runs after the call has returned; leave it out there")
    run = functools.partial(
        _run_chain(compiler_options),
        denoise_fn if isinstance(denoise_fn, Partial) else Partial(denoise_fn),
        schedule,
        x_T,
        checked_key(key, x_T.shape[0]),
        jnp.asarray(t),
        jnp.asarray(t_prev),
        jnp.asarray(eta, jnp.float32),
        make_clip(clip_x0, dynamic_threshold, max_threshold, x_T.shape),
        kept=tuple(np.round(np.linspace(0, len(t) - 1, trajectory)).astype(int).tolist()),
        method=method,
        variance=variance,
        prediction=prediction,
        rederive_eps=rederive_eps,
    )
    x0, kept = run(listener=None) if on_step is None else run_with_listener(run, on_step)
    return (x0, kept) if trajectory else x0


@compiled("kept", "method", "variance", "prediction", "rederive_eps")
def _run_chain(
    denoise_fn: Partial,
    schedule: Schedule,
    x_T: jax.Array,
    key: jax.Array,
    t: jax.Array,
    t_prev: jax.Array,
    eta: jax.Array,
    clip: Clip | None,
    *,
    listener: jax.Array | None,
    kept: tuple[int, ...],
    method: str,
    variance: str,
    prediction: str,
    rederive_eps: bool,
) -> tuple[jax.Array, Trajectory]:
    """The compiled chain; ``kept`` lists the steps that the trajectory keeps."""
    slots = np.full(t.shape[0], len(kept), np.int32)  # one past the end: scattered to nowhere
    slots[list(kept)] = np.arange(len(kept))
    guess_at = functools.partial(_guess, denoise_fn, schedule, prediction, clip, rederive_eps)

    def step(carry: tuple[jax.Array, jax.Array, Trajectory], i: jax.Array) -> tuple[Any, None]:
        x_t, x0_hat_last, trajectory = carry
        now = t[i]
        guess = guess_at(x_t, now)
        if kept:
            trajectory = jax.tree.map(
                lambda all_steps, this: all_steps.at[jnp.asarray(slots)[i]].set(this, mode="drop"),
                trajectory,
                Trajectory(now, x_t, guess.x0_hat),
            )
        t_last = t[jnp.maximum(i - 1, 0)]
        noise = functools.partial(noise_at, key, now, x_t)
        moment = Moment(schedule, x_t, now, t_prev[i], guess, x0_hat_last, t_last, guess_at, noise, eta, variance)
        x_prev = STEPS[method](moment)
        tell(listener, i)
        return (x_prev, guess.x0_hat, trajectory), None

    empty = Trajectory(*(jnp.zeros((len(kept), *shape), dtype) for shape, dtype in _trajectory_shapes(x_T)))
    (x0, _, trajectory), _ = jax.lax.scan(step, (x_T, jnp.zeros_like(x_T), empty), jnp.arange(t.shape[0]))
    return x0, trajectory


def _guess(
    denoise_fn: Partial,
    schedule: Schedule,
    prediction: str,
    clip: Clip | None,
    rederive_eps: bool,
    x_t: jax.Array,
    t: jax.Array,
) -> Guess:
    """One network call, and what it says."""
    output, variance_output = network_output(denoise_fn, x_t, t)
    x0_hat = clipped(x0_from(prediction, schedule, output, x_t, t), clip)
    # Without clipping the two are the same number, and the network's own is the better conditioned.
    source = ("x0", x0_hat) if rederive_eps and clip is not None else (prediction, output)
    return Guess(x0_hat, eps_from(source[0], schedule, source[1], x_t, t), variance_output)


def network_output(denoise_fn: Partial, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """One network call at one level for the whole batch: float32, in the halves that ``split_output`` tells apart."""
    return split_output(denoise_fn(x_t, jnp.full(x_t.shape[:1], t)).astype(jnp.float32), x_t)


def _trajectory_shapes(x_T: jax.Array) -> list[tuple[tuple[int, ...], Any]]:
    return [((), jnp.int32), (x_T.shape, jnp.float32), (x_T.shape, jnp.float32)]


def noise_at(key: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise shaped as x, from one key or from one key an image."""
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, t), x.shape, x.dtype)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, t), x.shape[1:], x.dtype))(key)


def _check_choices(method: str, eta: float | jax.Array, variance: str, prediction: str) -> None:
    for field, value, choices in (
        ("sampling.method", method, METHODS),
        ("sampling.variance", variance, VARIANCES),
        ("diffusion.prediction", prediction, PREDICTIONS),
    ):
        if value not in choices:
            raise ValueError(f"{field}={value!r}: choose one of {', '.join(choices)}")
    if isinstance(eta, jax.core.Tracer):
        return
    if np.ndim(eta):
        raise ValueError(f"sampling.eta={eta}: must be one number")
    if not 0 <= float(eta) <= 1:
        raise ValueError(f"sampling.eta={eta}: must lie in 0 .. 1")
    if method != "ddim" and float(eta) != 0:
        raise ValueError(f"sampling.eta={eta}: method {method!r} has no eta; leave it at 0 or use method 'ddim'")


def _check_signal(schedule: Schedule, prediction: str, first_t: int) -> None:
    """Lin et al. 2023, section 3.2: where there is no signal, the noise says nothing of the image."""
    if prediction != "eps" or isinstance(schedule.alpha_bars, jax.core.Tracer):
        return
    if np.asarray(schedule.alpha_bars)[first_t] == 0:
        raise ValueError(
            f"prediction='eps': the chain starts at t = {first_t}, which is pure noise; it needs a network that "
            "predicts v or x0, or a plan that starts below"
        )


def checked_plan(
    schedule: Schedule, num_steps: int, spacing: str, plan: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(t, t_prev), int32 [S], of a chain on a schedule; warnings point at the caller's caller."""
    num_timesteps = schedule.num_timesteps
    if plan is None:
        return spaced(num_timesteps, num_steps, spacing, stacklevel=4)
    if len(plan) != 2:
        raise ValueError(f"plan: has {len(plan)} parts; give (t, t_prev)")
    t, t_prev = (np.asarray(x) for x in plan)
    if t.ndim != 1 or t.shape != t_prev.shape or not len(t) or {t.dtype.kind, t_prev.dtype.kind} - set("iu"):
        raise ValueError(f"plan: t {t.dtype}{t.shape} and t_prev {t_prev.dtype}{t_prev.shape} must be int [S] both")
    t, t_prev = t.astype(np.int32), t_prev.astype(np.int32)
    # t_prev = t = 0 is the last step of a chain that ends at the first noise level, see timestep_plan.
    stays = (t_prev >= t) & (t_prev != 0)
    bad = np.flatnonzero((t < 0) | (t >= num_timesteps) | (t_prev < -1) | (t_prev > t) | stays)
    if bad.size:
        i = bad[0]
        raise ValueError(
            f"plan: step {i} goes from t = {t[i]} to t_prev = {t_prev[i]}; "
            f"needs 0 <= t < {num_timesteps} and -1 <= t_prev < t, or t_prev = t = 0"
        )
    if np.any(t_prev[:-1] != t[1:]):
        i = int(np.flatnonzero(t_prev[:-1] != t[1:])[0])
        warnings.warn(
            f"plan: step {i} ends at t_prev = {t_prev[i]}, but step {i + 1} begins at t = {t[i + 1]}: the network is "
            "told another noise level than the image has",
            ScheduleWarning,
            stacklevel=3,
        )
    return t, t_prev


def checked_key(key: jax.Array, num_images: int) -> jax.Array:
    """One key, or one an image; raw key data are wrapped."""
    if getattr(key, "dtype", None) == jnp.uint32:
        key = jax.random.wrap_key_data(key)
    if not hasattr(key, "dtype") or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key={key!r}: give a key, such as jax.random.key(0), or one an image")
    if key.shape not in ((), (num_images,)):
        raise ValueError(f"key: shape {key.shape}; give one key, or {num_images} keys, one an image")
    return key
