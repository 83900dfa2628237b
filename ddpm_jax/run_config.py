"""The config file that ``--workdir`` alone stands for: that of the run in it."""

from ddpm_jax import experiment
from ddpm_jax.config import Config, ConfigError


def get_config(workdir: str) -> Config:
    """The config of the run in ``workdir``."""
    config = experiment.read_config(workdir)
    if config is None:
        raise ConfigError(f"--config is missing, and {workdir} holds no run; for example --config configs/digits.py")
    return config
