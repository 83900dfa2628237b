"""DDIM inversion: from a clean image to the noise that DDIM turns into it."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddpm_jax.diffusion.compiling import compiled
from ddpm_jax.diffusion.listening import run_with_listener, tell
from ddpm_jax.diffusion.process import PREDICTIONS, eps_from, unknown_prediction
from ddpm_jax.diffusion.samplers import checked_plan, network_output
from ddpm_jax.diffusion.schedule import Schedule, rates


def invert(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    x0: jax.Array,
    *,
    num_steps: int = 50,
    spacing: str = "leading",
    plan: tuple[np.ndarray, np.ndarray] | None = None,
    prediction: str = "eps",
    on_step: Callable[[int], object] | None = None,
    compiler_options: Mapping[str, str] | None = None,
) -> jax.Array:
    """x_T whose DDIM chain (eta = 0) ends in x0, inside one compiled ``lax.scan``  (Song et al. 2021, section 4.3).

    The probability flow (eq. 14), followed upwards by Euler steps in sqrt((1 - alpha_bar) / alpha_bar):
    x0_hat = (x - sqrt(1 - alpha_bar) eps_hat) / sqrt(alpha_bar)
    x_next = sqrt(alpha_bar_next) x0_hat + sqrt(1 - alpha_bar_next) eps_hat

    The network is asked at the level where x is. Clean data have none: there it is told the t of the first step up. As
    every step down asks at its upper end and every step up at its lower one, the two chains undo each other to
    first order, better with more steps. Nothing is clipped, which could not be undone: sample with ``clip_x0=False``.

    Args:
        denoise_fn: ``denoise_fn(x_t, t)``, as in ``sample``; guidance w > 1 makes the inverse unstable.
        schedule: the noise schedule.
        x0: clean images, float32 [B H W C].
        num_steps: S, network calls.
        spacing: of the timesteps, see ``timestep_plan``.
        plan: ``(t, t_prev)`` of the chain to be inverted, noisy to clean as for ``sample``, in place of num_steps and
            spacing. Where its last t_prev is not -1, x0 is an image of that noise level.
        prediction: what the network predicts: "eps", "x0" or "v".
        on_step, compiler_options: see ``sample``.

    Returns:
        x_T, float32 [B H W C], at the noise level of the plan's first t.

    Raises:
        ValueError: an argument is out of range; the message names it and the remedy.
    """
    if prediction not in PREDICTIONS:
        raise unknown_prediction(prediction)
    t, t_prev = checked_plan(schedule, num_steps, spacing, plan)
    x0 = jnp.asarray(x0, jnp.float32)
    if on_step is not None and isinstance(x0, jax.core.Tracer):
        raise ValueError("on_step: inside another jit the chain runs after the call has returned; leave it out there")
    run = functools.partial(
        _run_inversion(compiler_options),
        denoise_fn if isinstance(denoise_fn, Partial) else Partial(denoise_fn),
        schedule,
        x0,
        jnp.asarray(t_prev[::-1]),
        jnp.asarray(t[::-1]),
        prediction=prediction,
    )
    return run(listener=None) if on_step is None else run_with_listener(run, on_step)


@compiled("prediction")
def _run_inversion(
    denoise_fn: Partial,
    schedule: Schedule,
    x0: jax.Array,
    t: jax.Array,
    t_next: jax.Array,
    *,
    listener: jax.Array | None,
    prediction: str,
) -> jax.Array:
    """The compiled chain; t and t_next ascend, and t may begin with -1."""

    def step(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        asked = jnp.where(t[i] < 0, t_next[i], t[i])
        output, _ = network_output(denoise_fn, x, asked)
        eps_hat = eps_from(prediction, schedule, output, x, asked)
        now, following = rates(schedule, t[i], x), rates(schedule, t_next[i], x)
        x0_hat = (x - now.noise * eps_hat) / now.signal
        tell(listener, i)
        return following.signal * x0_hat + following.noise * eps_hat, None

    x_T, _ = jax.lax.scan(step, x0, jnp.arange(t.shape[0]))
    return x_T
