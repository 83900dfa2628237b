"""CelebA-HQ at 256x256: the recipe of Ho et al. 2020 for faces, the network of google/ddpm-celebahq-256.

    python -m ddpm_jax.train --config configs/celebahq256.py
    python -m ddpm_jax.train --config configs/celebahq256.py --config.data.source=folder:/path/to/faces

Source: Ho et al. 2020, `scripts/run_celebahq.py`: 113.7 M parameters, attention at 16x16, no dropout, Adam at 2e-5 with
5,000 steps of warm-up, batches of 64, fixed-small variance, half a million steps. TFDS prepares `celeb_a_hq/256` from
files that are fetched by hand (its page says how); a folder of images needs none of that. Ours: the residual blocks are
computed again in the backward pass (`train.remat`), which takes time and saves memory.

Expected (theirs): the samples of the paper's figure 1; no FID was published. Not measured here: no accelerator and no
faces were at hand. Whoever wants the trained network: `python -m ddpm_jax.convert from-diffusers
google/ddpm-celebahq-256 --workdir runs/celebahq256`.
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
        data=DataConfig(source="tfds:celeb_a_hq/256", split="train", image_size=256, channels=3, random_flip=True),
        model=ModelConfig(
            base_channels=128,
            channel_mults=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(16,),
        ),
        diffusion=DiffusionConfig(schedule="linear", num_timesteps=1000, prediction="eps", loss="l2"),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=5000, grad_clip_norm=1.0, ema_decay=0.9999),
        train=TrainConfig(
            batch_size=64,
            num_steps=500_000,
            log_every=100,
            checkpoint_every=10_000,
            sample_every=10_000,
            num_samples=16,
            remat="blocks",
        ),
        sampling=SamplingConfig(method="ddpm", num_steps=1000, variance="fixed_small"),
    )
