"""Schedules as functions of a continuous time u in [0, 1], for training at noise levels between those of the table."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.schedule import COSINE_OFFSET, MAX_SIGNAL_RATE, MIN_SIGNAL_RATE, Schedule

TIMES = ("discrete", "continuous")


def schedule_at(name: str, u: jax.Array) -> Schedule:
    """A table of the noise levels at the times u: what takes a schedule and t also takes this one and 0 .. B-1.

    ======================  ====================================================================================
    ``cosine``              alpha_bar(u) = f(u) / f(0), f(u) = cos^2((u + .008) / 1.008 pi/2)
                                                                             (Nichol & Dhariwal 2021, eq. 17)
    ``offset_cosine``       alpha_bar(u) = cos^2(a + (b - a) u), a = acos .95, b = acos .02
    ======================  ====================================================================================

    The table of T timesteps holds cosine at u = (t + 1) / T, but for its last betas, which are capped, and
    offset_cosine at u = t / (T - 1). 1 - alpha_bar is a product of sines, which keeps its digits near clean data.

    Args:
        name: of a schedule that has such a form.
        u: float32 [B], 0 is the cleanest and 1 the noisiest.

    Returns:
        Tables [B] of alpha_bar and 1 - alpha_bar. Their entries do not follow from one another: the betas are NaN.
    """
    check_time("continuous", name)
    alpha_bars, noise_levels = _FORMS[name](u)
    return Schedule(jnp.full_like(u, jnp.nan), alpha_bars, noise_levels)


def check_time(time: str, schedule: str, zero_snr: bool = False, learned_variance: bool = False) -> None:
    """Refuses continuous times where the schedule is known at its T timesteps only.

    Raises:
        ValueError: one line that names the field and the remedy.
    """
    if time not in TIMES:
        raise ValueError(f"diffusion.time={time!r}: choose one of {', '.join(TIMES)}")
    if time == "discrete":
        return
    if schedule not in _FORMS:
        raise ValueError(
            f"diffusion.time='continuous': the schedule {schedule!r} is a table of T timesteps; use discrete, or one "
            f"of {', '.join(_FORMS)}"
        )
    if zero_snr:
        raise ValueError("diffusion.time='continuous': rescale_zero_snr rescales a table of T timesteps; use discrete")
    if learned_variance:
        raise ValueError(
            "diffusion.time='continuous': learned_variance is that of a step between two timesteps; use discrete"
        )


def _cosine(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    start = COSINE_OFFSET / (1 + COSINE_OFFSET) * math.pi / 2
    turn = u / (1 + COSINE_OFFSET) * math.pi / 2
    scale = math.cos(start) ** 2
    return jnp.cos(start + turn) ** 2 / scale, jnp.sin(turn) * jnp.sin(2 * start + turn) / scale


def _offset_cosine(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    start, end = math.acos(MAX_SIGNAL_RATE), math.acos(MIN_SIGNAL_RATE)
    angle = start + (end - start) * u
    return jnp.cos(angle) ** 2, jnp.sin(angle) ** 2


_FORMS: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {
    "cosine": _cosine,
    "offset_cosine": _offset_cosine,
}
