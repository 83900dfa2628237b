"""Every noise schedule side by side."""

from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import diffusion


class Curves(NamedTuple):
    """Of one schedule, [T] each: sqrt(alpha_bar), sqrt(1 - alpha_bar), log(alpha_bar / (1 - alpha_bar))."""

    signal_rate: np.ndarray
    noise_rate: np.ndarray
    log_snr: np.ndarray


def schedule_curves(num_timesteps: int = 1000) -> dict[str, Curves]:
    """The curves of every schedule of a length, the beta range scaled to it.

    Raises:
        ValueError: a length that a schedule cannot have.
    """
    found = {}
    for name in diffusion.SCHEDULES:
        schedule = diffusion.make_schedule(name, num_timesteps=num_timesteps)
        alpha_bars, levels = (np.asarray(x, np.float64) for x in (schedule.alpha_bars, schedule.noise_levels))
        found[name] = Curves(np.sqrt(alpha_bars), np.sqrt(levels), np.log(alpha_bars) - np.log(levels))
    return found


def schedule_numbers(curves: dict[str, Curves]) -> dict[str, Any]:
    """Each curve at both ends and at the quarters between them, ready for JSON."""
    num_timesteps = len(next(iter(curves.values())).log_snr)
    t = [0, num_timesteps // 4, num_timesteps // 2, 3 * num_timesteps // 4, num_timesteps - 1]
    return {
        "num_timesteps": num_timesteps,
        "t": t,
        "schedules": {name: {k: x[t].tolist() for k, x in c._asdict().items()} for name, c in curves.items()},
    }
