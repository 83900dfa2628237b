"""A run whose network is exact: the data are N(mu, s^2), so that every chain is known in closed form."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ddpm_jax import experiment
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SamplingConfig

MU, STD = -0.2, 0.5


def _eps_hat(alpha_bars, x_t, t, label=None):
    """E[eps | x_t] = sqrt(1 - ab) (x_t - sqrt(ab) mu) / (ab s^2 + 1 - ab)."""
    ab = alpha_bars[t][:, None, None, None]
    return jnp.sqrt(1 - ab) * (x_t - jnp.sqrt(ab) * MU) / (ab * STD**2 + 1 - ab)


def run(**sampling) -> experiment.Run:
    """T = 1000, gray 8x8."""
    config = Config(
        data=DataConfig(source="", image_size=8, channels=1),
        model=ModelConfig(base_channels=8, channel_mults=(1,), attention_resolutions=()),
        diffusion=DiffusionConfig(schedule="linear"),
        sampling=SamplingConfig(**{"num_steps": 20, "spacing": "trailing"} | sampling),
    )
    schedule = experiment.make_schedule(config)
    return experiment.Run(config, schedule, Partial(_eps_hat, jnp.asarray(schedule.alpha_bars)), None)


def exact_x0(schedule, x_T: jax.Array) -> jax.Array:
    """Where the probability flow takes x_T: the quantile of N(mu_T, s_T^2) at x_T becomes that of N(mu, s^2)."""
    ab = schedule.alpha_bars[-1]
    return MU + STD * (x_T - jnp.sqrt(ab) * MU) / jnp.sqrt(ab * STD**2 + 1 - ab)
