"""Handwritten digits on a CPU."""

from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=DataConfig(source="sklearn:digits", image_size=16, channels=1),
        model=ModelConfig(base_channels=32, channel_mults=(1, 2, 2), num_res_blocks=1, attention_resolutions=(8,)),
        diffusion=DiffusionConfig(schedule="cosine"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, ema_decay=0.999),
        train=TrainConfig(
            batch_size=64, num_steps=2000, log_every=50, checkpoint_every=500, sample_every=500, num_samples=32
        ),
        sampling=SamplingConfig(method="ddim", num_steps=50, spacing="trailing"),
    )
