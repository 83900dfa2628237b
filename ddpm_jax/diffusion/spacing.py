"""Which timesteps a short chain visits: explicit (t, t_prev) tables."""

import math
import warnings
from collections.abc import Callable

import numpy as np

from ddpm_jax.diffusion.schedule import ScheduleWarning

ENDS = ("clean", "first")


def timestep_plan(
    num_timesteps: int, num_steps: int, spacing: str, *, offset: int = 0, end: str = "clean"
) -> tuple[np.ndarray, np.ndarray]:
    """The steps of a chain of S = num_steps calls on a schedule of T = num_timesteps, noisy to clean.

    =============  ===============================================  ==================================
    ``leading``    i (T // S) + offset                              as diffusers; never visits T - 1
    ``trailing``   round(T - i T / S) - 1                           starts at T - 1
    ``linspace``   round(linspace(0, T - 1, S))                     visits both ends
    ``quadratic``  floor(linspace(0, sqrt(.8 T), S)^2)              as ermongroup/ddim; dense near clean data
    =============  ===============================================  ==================================

    i = 0 .. S-1; all but ``trailing`` are then reversed. Where two steps of ``quadratic`` are alike the later one moves
    to the next free step, so that there are always exactly S distinct ones.

    Args:
        num_timesteps: T.
        num_steps: S.
        spacing: one of the four.
        offset: shifts ``leading``; diffusers' steps_offset.
        end: "clean", the last t_prev is -1; or "first", it is 0, so that the chain ends at the first noise level, as
            diffusers' DDIM does with set_alpha_to_one=False. Where the last t is 0 itself, t_prev is t there, and
            DDIM builds x_0 anew from the x0 and eps that the network finds in it.

    Returns:
        (t, t_prev), int32 [S], strictly decreasing; t_prev[i] = t[i + 1].

    Raises:
        ValueError: unknown spacing or end, num_steps outside 1 .. T, one step with a spacing that would start it near
            clean data, an offset past T - 1 or with another spacing than ``leading``.

    Warns:
        ScheduleWarning: ``leading`` starts below 0.9 T although sampling starts from pure noise.
    """
    return spaced(num_timesteps, num_steps, spacing, offset=offset, end=end, stacklevel=3)


def spaced(
    num_timesteps: int, num_steps: int, spacing: str, *, offset: int = 0, end: str = "clean", stacklevel: int
) -> tuple[np.ndarray, np.ndarray]:
    """``timestep_plan`` for those who warn in another's name."""
    if spacing not in _SPACINGS:
        raise ValueError(f"sampling.spacing={spacing!r}: choose one of {', '.join(_SPACINGS)}")
    if not isinstance(num_steps, int | np.integer) or not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"sampling.num_steps={num_steps}: must lie in 1 .. {num_timesteps}, the timesteps of the schedule"
        )
    if num_steps == 1 and spacing != "trailing" and num_timesteps > 1:
        raise ValueError(f"sampling.spacing={spacing!r} with one step would start at t = 0: use trailing")
    if end not in ENDS:
        raise ValueError(f"sampling.end={end!r}: choose one of {', '.join(ENDS)}")
    t = _SPACINGS[spacing](num_timesteps, num_steps).astype(np.int32)
    t += _checked_offset(offset, spacing, num_timesteps - 1 - int(t[0]), num_steps)
    if spacing == "leading" and t[0] < min(0.9 * num_timesteps, num_timesteps - 1):
        warnings.warn(
            f"sampling.spacing='leading' with num_steps={num_steps} starts at t = {t[0]} of {num_timesteps}, "
            "but x_T is pure noise: use trailing",
            ScheduleWarning,
            stacklevel=stacklevel,
        )
    return t, np.append(t[1:], np.int32(-1 if end == "clean" else 0))


def _checked_offset(offset: int, spacing: str, room: int, num_steps: int) -> np.int32:
    if offset and spacing != "leading":
        raise ValueError(f"sampling.steps_offset={offset}: spacing {spacing!r} has none; use 0, or leading")
    if not 0 <= offset <= room:
        raise ValueError(
            f"sampling.steps_offset={offset}: must lie in 0 .. {room}, what {num_steps} steps leave before the last "
            "timestep; use that, or fewer steps"
        )
    return np.int32(offset)


def _leading(num_timesteps: int, num_steps: int) -> np.ndarray:
    return np.arange(num_steps)[::-1] * (num_timesteps // num_steps)


def _trailing(num_timesteps: int, num_steps: int) -> np.ndarray:
    return np.round(num_timesteps - np.arange(num_steps) * num_timesteps / num_steps) - 1


def _linspace(num_timesteps: int, num_steps: int) -> np.ndarray:
    return np.round(np.linspace(0, num_timesteps - 1, num_steps))[::-1]


def _quadratic(num_timesteps: int, num_steps: int) -> np.ndarray:
    t = np.floor(np.linspace(0, math.sqrt(0.8 * num_timesteps), num_steps) ** 2)
    # t_i = max(t_i, t_{i-1} + 1), as a running maximum of t_i - i.
    i = np.arange(num_steps)
    return (np.maximum.accumulate(t - i) + i)[::-1]


_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
}
SPACINGS = tuple(_SPACINGS)
