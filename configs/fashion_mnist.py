"""Fashion-MNIST at 32x32, gray: a quick first run on an accelerator.

    python -m ddpm_jax.train --config configs/fashion_mnist.py

Source: our own choice of sizes for the U-Net of Ho et al. 2020. The 28x28 images are resized to 32x32. They are not
mirrored: all shoes in the set point the same way.

Expected: garments that a person names at once. Not measured here at full length.
"""

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
        data=DataConfig(source="tfds:fashion_mnist", split="train", image_size=32, channels=1),
        model=ModelConfig(
            base_channels=64,
            channel_mults=(1, 2, 2),
            num_res_blocks=2,
            attention_resolutions=(8,),
            dropout=0.1,
        ),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=500, ema_decay=0.999),
        train=TrainConfig(
            batch_size=128, num_steps=20_000, log_every=100, checkpoint_every=1000, sample_every=1000, num_samples=32
        ),
        sampling=SamplingConfig(method="ddim", num_steps=50, spacing="trailing"),
    )
