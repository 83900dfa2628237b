"""Which timesteps a short chain visits: explicit (t, t_prev) tables."""

import math
import warnings
from collections.abc import Callable

import numpy as np

from ddpm_jax.diffusion.schedule import ScheduleWarning


def timestep_plan(num_timesteps: int, num_steps: int, spacing: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps of a chain of S = num_steps calls on a schedule of T = num_timesteps, noisy to clean.

    =============  ===============================================  ==================================
    ``leading``    i (T // S)                                       as diffusers; never visits T - 1
    ``trailing``   round(T - i T / S) - 1                           starts at T - 1
    ``linspace``   round(linspace(0, T - 1, S))                     visits both ends
    ``quadratic``  floor(linspace(0, sqrt(.8 T), S)^2)              as ermongroup/ddim; dense near clean data
    =============  ===============================================  ==================================

    i = 0 .. S-1; all but ``trailing`` are then reversed. Where two steps of ``quadratic`` are alike the later one moves
    to the next free step, so that there are always exactly S distinct ones.

    Returns:
        (t, t_prev), int32 [S], strictly decreasing; t_prev[i] = t[i + 1] and the last t_prev is -1, clean data.

    Raises:
        ValueError: unknown spacing, num_steps outside 1 .. T, or one step with a spacing that would start it near
            clean data.

    Warns:
        ScheduleWarning: ``leading`` starts below 0.9 T although sampling starts from pure noise.
    """
    return spaced(num_timesteps, num_steps, spacing, stacklevel=3)


def spaced(num_timesteps: int, num_steps: int, spacing: str, *, stacklevel: int) -> tuple[np.ndarray, np.ndarray]:
    """``timestep_plan`` for those who warn in another's name."""
    if spacing not in _SPACINGS:
        raise ValueError(f"sampling.spacing={spacing!r}: choose one of {', '.join(_SPACINGS)}")
    if not isinstance(num_steps, int | np.integer) or not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"sampling.num_steps={num_steps}: must lie in 1 .. {num_timesteps}, the timesteps of the schedule"
        )
    if num_steps == 1 and spacing != "trailing" and num_timesteps > 1:
        raise ValueError(f"sampling.spacing={spacing!r} with one step would start at t = 0: use trailing")
    t = _SPACINGS[spacing](num_timesteps, num_steps).astype(np.int32)
    if spacing == "leading" and t[0] < min(0.9 * num_timesteps, num_timesteps - 1):
        warnings.warn(
            f"sampling.spacing='leading' with num_steps={num_steps} starts at t = {t[0]} of {num_timesteps}, "
            "but x_T is pure noise: use trailing",
            ScheduleWarning,
            stacklevel=stacklevel,
        )
    return t, np.append(t[1:], np.int32(-1))


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
