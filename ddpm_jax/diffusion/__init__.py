"""The mathematics of denoising diffusion: pure functions over jax arrays, without a network.

``from ddpm_jax import diffusion`` is what notebooks import. Modules, in the order in which to read them: ``schedule``,
``process``, ``losses``, ``spacing``, ``samplers``, ``guidance``.
"""

from ddpm_jax.diffusion.guidance import guided
from ddpm_jax.diffusion.losses import LOSSES, WEIGHTS, loss, target, weight
from ddpm_jax.diffusion.process import PREDICTIONS, eps_from, posterior, q_sample, v_from, x0_from
from ddpm_jax.diffusion.samplers import METHODS, VARIANCES, Trajectory, ddim_step, ddpm_step, sample
from ddpm_jax.diffusion.schedule import (
    SCHEDULES,
    Schedule,
    ScheduleWarning,
    make_schedule,
    rescale_zero_snr,
    schedule_betas,
    schedule_from_betas,
)
from ddpm_jax.diffusion.spacing import ENDS, SPACINGS, timestep_plan

__all__ = [
    "ENDS",
    "LOSSES",
    "METHODS",
    "PREDICTIONS",
    "SCHEDULES",
    "SPACINGS",
    "VARIANCES",
    "WEIGHTS",
    "Schedule",
    "ScheduleWarning",
    "Trajectory",
    "ddim_step",
    "ddpm_step",
    "eps_from",
    "guided",
    "loss",
    "make_schedule",
    "posterior",
    "q_sample",
    "rescale_zero_snr",
    "sample",
    "schedule_betas",
    "schedule_from_betas",
    "target",
    "timestep_plan",
    "v_from",
    "weight",
    "x0_from",
]
