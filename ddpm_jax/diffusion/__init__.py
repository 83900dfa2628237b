"""The mathematics of denoising diffusion: pure functions over jax arrays, without a network.

``from ddpm_jax import diffusion`` is what notebooks import. Modules, in the order in which to read them: ``schedule``,
``continuous``, ``process``, ``losses``, ``spacing``, ``variance``, ``steps``, ``clipping``, ``samplers``,
``inversion``, ``interpolation``, ``guidance``, ``likelihood``.
"""

from ddpm_jax.diffusion.clipping import check_thresholds, threshold
from ddpm_jax.diffusion.continuous import TIMES, check_time, schedule_at
from ddpm_jax.diffusion.guidance import guided
from ddpm_jax.diffusion.interpolation import slerp
from ddpm_jax.diffusion.inversion import invert
from ddpm_jax.diffusion.likelihood import Bound, decoder_term, prior_term, step_term, variational_bound
from ddpm_jax.diffusion.losses import LOSSES, WEIGHTS, loss, target, variance_loss, weight
from ddpm_jax.diffusion.process import PREDICTIONS, eps_from, posterior, posterior_variance, q_sample, v_from, x0_from
from ddpm_jax.diffusion.samplers import Trajectory, sample
from ddpm_jax.diffusion.schedule import (
    SCHEDULES,
    Schedule,
    ScheduleWarning,
    make_schedule,
    rates,
    rescale_zero_snr,
    schedule_betas,
    schedule_from_betas,
)
from ddpm_jax.diffusion.spacing import ENDS, SPACINGS, timestep_plan
from ddpm_jax.diffusion.steps import (
    METHODS,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    exponential_step,
    heun_step,
)
from ddpm_jax.diffusion.variance import VARIANCES, check_variance, model_log_variance, split_output

__all__ = [
    "ENDS",
    "LOSSES",
    "METHODS",
    "PREDICTIONS",
    "SCHEDULES",
    "SPACINGS",
    "TIMES",
    "VARIANCES",
    "WEIGHTS",
    "Bound",
    "Schedule",
    "ScheduleWarning",
    "Trajectory",
    "check_thresholds",
    "check_time",
    "check_variance",
    "ddim_step",
    "ddpm_step",
    "decoder_term",
    "dpmpp_step",
    "eps_from",
    "exponential_step",
    "guided",
    "heun_step",
    "invert",
    "loss",
    "make_schedule",
    "model_log_variance",
    "posterior",
    "posterior_variance",
    "prior_term",
    "q_sample",
    "rates",
    "rescale_zero_snr",
    "sample",
    "schedule_at",
    "schedule_betas",
    "schedule_from_betas",
    "slerp",
    "split_output",
    "step_term",
    "target",
    "threshold",
    "timestep_plan",
    "v_from",
    "variance_loss",
    "variational_bound",
    "weight",
    "x0_from",
]
