"""Noise schedules: beta and alpha-bar tables, built in float64 numpy and cast to float32 once.

The forward process is q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I), alpha_bar_t = prod_{s<=t} (1 - beta_s)
(Ho et al. 2020, eq. 2 and 4). t = 0 is one step of noise; t = -1 is clean data, alpha_bar = 1.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Sampling starts from N(0, I), so the chain should end there: a signal rate above this is worth a warning.
MAX_FINAL_SIGNAL_RATE = 0.03
COSINE_OFFSET = 0.008  # of cosine
MAX_SIGNAL_RATE, MIN_SIGNAL_RATE = 0.95, 0.02  # of offset_cosine


class ScheduleWarning(UserWarning):
    """A schedule or a plan that works but probably is not what was meant."""


class Schedule(NamedTuple):
    """Tables of one noise schedule, float32 [T]; a pytree, so it is an ordinary argument of a jitted function.

    ``noise_levels`` is 1 - alpha_bar, formed in float64: in float32 the subtraction loses 1.7e-4 (relative) at t = 0.
    """

    betas: jax.Array
    alpha_bars: jax.Array
    noise_levels: jax.Array

    @property
    def num_timesteps(self) -> int:
        """T, the length of the training chain."""
        return self.betas.shape[0]


class Rates(NamedTuple):
    """alpha_bar and 1 - alpha_bar looked up at some timesteps, shaped to multiply a batch of images."""

    alpha_bar: jax.Array
    noise_level: jax.Array

    @property
    def signal(self) -> jax.Array:
        """sqrt(alpha_bar), the coefficient of x0."""
        return jnp.sqrt(self.alpha_bar)

    @property
    def noise(self) -> jax.Array:
        """sqrt(1 - alpha_bar), the coefficient of eps."""
        return jnp.sqrt(self.noise_level)


def make_schedule(
    name: str,
    *,
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    scale_betas: bool = True,
    betas: Sequence[float] = (),
    zero_snr: bool = False,
) -> Schedule:
    """A noise schedule by name.

    ======================  ===================================================================================
    ``linear``              beta = linspace(beta_start, beta_end, T)                  (Ho et al. 2020, section 4)
    ``quadratic``           beta = linspace(sqrt(beta_start), sqrt(beta_end), T)^2    (Song et al. 2021, DDIM code;
                                                                             diffusers calls it scaled_linear)
    ``sigmoid``             beta = beta_start + (beta_end - beta_start) sigmoid(linspace(-6, 6, T))
    ``cosine``              alpha_bar_t ~ cos^2((u + .008) / 1.008 pi/2), u = (t + 1) / T, beta <= .999
                                                                             (Nichol & Dhariwal 2021, eq. 17)
    ``offset_cosine``       alpha_bar_t = cos^2(a + (b - a) t / (T - 1)), a = acos .95, b = acos .02
    ``table``               beta = betas, [T], as they are
    ======================  ===================================================================================

    The beta range of the first three belongs to T = 1000. ``scale_betas`` multiplies it by 1000 / T, which keeps
    alpha_bar_T where it is; the others need no such thing and ignore the range. ``zero_snr`` passes the betas through
    ``rescale_zero_snr``.

    Raises:
        ValueError: unknown name, num_timesteps < 1, a beta outside (0, 1), or a table that is missing, not asked for
            or of another length than T. The last beta of a table may be 1.

    Warns:
        ScheduleWarning: sqrt(alpha_bar_T) > 0.03: the chain does not end in the noise that sampling starts from.
    """
    return schedule_from_betas(
        schedule_betas(
            name,
            num_timesteps=num_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            scale_betas=scale_betas,
            betas=betas,
            zero_snr=zero_snr,
        )
    )


def schedule_betas(
    name: str,
    *,
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    scale_betas: bool = True,
    betas: Sequence[float] = (),
    zero_snr: bool = False,
) -> np.ndarray:
    """The betas of ``make_schedule``, float64 [T], checked; without JAX, so that a config can be validated anywhere."""
    if name not in (*SCHEDULES, "table"):
        raise ValueError(f"diffusion.schedule={name!r}: choose one of {', '.join((*SCHEDULES, 'table'))}")
    if num_timesteps < 1:
        raise ValueError(f"diffusion.num_timesteps={num_timesteps}: must be at least 1")
    if name == "table":
        table = _table(betas, num_timesteps)
    elif len(betas):
        raise ValueError(f"diffusion.schedule={name!r}: has a formula of its own; use 'table', or leave betas out")
    else:
        table = _formula(name, num_timesteps, beta_start, beta_end, scale_betas)
    return rescale_zero_snr(table) if zero_snr else table


def schedule_from_betas(betas: np.ndarray | Sequence[float]) -> Schedule:
    """A schedule from its betas [T], each in (0, 1), the last in (0, 1]; float64 betas give the exact tables.

    Where the last is 1, alpha_bar_T = 0: the chain ends in pure noise, and a network that predicts eps is of no use.
    """
    betas = _table(betas)
    with np.errstate(divide="ignore"):  # log 0, of which exp and expm1 know what to make
        log_alpha_bars = np.cumsum(np.log1p(-betas))
    signal_rate = math.exp(0.5 * log_alpha_bars[-1])
    if signal_rate > MAX_FINAL_SIGNAL_RATE:
        warnings.warn(
            f"diffusion.schedule: sqrt(alpha_bar_T) = {signal_rate:.3g} > {MAX_FINAL_SIGNAL_RATE} at the last of "
            f"{betas.size} timesteps, but sampling starts from pure noise; raise num_timesteps or the beta range",
            ScheduleWarning,
            stacklevel=3,
        )
    return Schedule(*(jnp.asarray(x, jnp.float32) for x in (betas, np.exp(log_alpha_bars), -np.expm1(log_alpha_bars))))


def rescale_zero_snr(betas: np.ndarray | Sequence[float]) -> np.ndarray:
    """Betas whose chain ends in pure noise: sqrt(alpha_bar) shifted and scaled so that the last is 0, the first kept.

    r_t = sqrt(alpha_bar_t);  r'_t = (r_t - r_T) r_0 / (r_0 - r_T)  (Lin et al. 2023, algorithm 1). The last beta is 1.

    Args:
        betas: [T], T at least 2, each in (0, 1).

    Returns:
        float64 [T], for ``schedule_from_betas``.
    """
    betas = _table(betas)
    if betas.size < 2:
        raise ValueError("diffusion.rescale_zero_snr=True: needs at least 2 timesteps, a first to keep and a last")
    signal_rates = np.sqrt(np.cumprod(1 - betas))
    first, last = signal_rates[0], signal_rates[-1]
    alpha_bars = ((signal_rates - last) * first / (first - last)) ** 2
    return np.concatenate([betas[:1], 1 - alpha_bars[1:] / alpha_bars[:-1]])


def rates(schedule: Schedule, t: jax.Array, x: jax.Array) -> Rates:
    """The one table look-up: alpha_bar and 1 - alpha_bar at ``t``, int32 [] or [B], shaped to broadcast against ``x``.

    t = -1 is clean data (1 and 0). Any other t outside 0 .. T-1 gives NaN instead of JAX's silent clamping.
    """
    t = jnp.asarray(t)

    def at(table: jax.Array, clean: float) -> jax.Array:
        values = table.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return jnp.where(t == -1, clean, values).reshape(t.shape + (1,) * (x.ndim - t.ndim))

    return Rates(at(schedule.alpha_bars, 1.0), at(schedule.noise_levels, 0.0))


def beta_between(now: Rates, prev: Rates) -> jax.Array:
    """1 - alpha_bar_t / alpha_bar_prev: beta_t on the full chain, and its counterpart on a shortened one.

    The difference is taken between whichever of the two tables is small there, where float32 is finest.
    """
    difference = jnp.where(now.alpha_bar > 0.5, now.noise_level - prev.noise_level, prev.alpha_bar - now.alpha_bar)
    return difference / prev.alpha_bar


def _formula(name: str, num_timesteps: int, beta_start: float, beta_end: float, scale_betas: bool) -> np.ndarray:
    for field, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < value < 1:
            raise ValueError(f"diffusion.{field}={value}: must lie in (0, 1)")
    scale = 1000 / num_timesteps if scale_betas else 1.0
    betas = _SCHEDULES[name](num_timesteps, scale * beta_start, scale * beta_end)
    bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
    if bad.size:
        raise ValueError(
            f"diffusion.num_timesteps={betas.size}: beta = {betas[bad[0]]:.4g} at t = {bad[0]} is outside (0, 1); "
            "raise num_timesteps (the scaled linear range needs more than 20) or set scale_betas=False"
        )
    return betas


def _table(betas: np.ndarray | Sequence[float], num_timesteps: int | None = None) -> np.ndarray:
    """Betas that somebody else made, float64 and checked; the last may be 1, as zero terminal SNR has it."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"diffusion.betas: shape {betas.shape}; give one number a timestep, [T]")
    if num_timesteps not in (None, betas.size):
        raise ValueError(
            f"diffusion.num_timesteps={num_timesteps}: diffusion.betas has {betas.size} numbers; give one a timestep"
        )
    bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
    if bad.size and (bad[0] < betas.size - 1 or betas[-1] != 1):
        raise ValueError(
            f"diffusion.betas[{bad[0]}]={betas[bad[0]]:.4g}: is outside (0, 1); give every step some noise, and none "
            "but the last all of it"
        )
    return betas


def _linear(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    return np.linspace(beta_start, beta_end, num_timesteps)


def _quadratic(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    return np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps) ** 2


def _sigmoid(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))


def _cosine(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    u = np.arange(num_timesteps + 1) / num_timesteps
    alpha_bars = np.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], 0.999)


def _offset_cosine(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    start, end = math.acos(MAX_SIGNAL_RATE), math.acos(MIN_SIGNAL_RATE)
    alpha_bars = np.cos(start + (end - start) * np.arange(num_timesteps) / max(num_timesteps - 1, 1)) ** 2
    return 1 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]])


_SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": _linear,
    "cosine": _cosine,
    "quadratic": _quadratic,
    "sigmoid": _sigmoid,
    "offset_cosine": _offset_cosine,
}
SCHEDULES = tuple(_SCHEDULES)
