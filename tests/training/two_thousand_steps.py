"""Run by test_long_run.py: a whole run on four host devices, watched; prints what it held, as one line of JSON."""

import gc
import json
import sys
from pathlib import Path

import jax
import numpy as np

from ddpm_jax import config as c
from ddpm_jax import train, training

STEPS, EVERY = 2000, 200


def rss():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main(folder):
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compilations.append(name) if name.endswith("backend_compile_duration") else None
    )
    np.savez(folder / "tiny.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8))
    found = []

    class Watched(training.Log):
        def add(self, step, metrics):
            super().add(step, metrics)
            if step % EVERY == EVERY // 2:  # between two checkpoints with their pictures
                gc.collect()
                arrays = jax.live_arrays()
                found.append(
                    {
                        "step": step,
                        "rss": rss(),
                        "arrays": len(arrays),
                        "bytes": sum(x.nbytes for x in arrays),
                        "compilations": len(compilations),
                        "files": len(list(Path("/proc/self/fd").iterdir())),
                        "threads": len(list(Path("/proc/self/task").iterdir())),
                    }
                )

    training.Log = Watched
    config = c.Config(
        data=c.DataConfig(source=f"npz:{folder / 'tiny.npz'}", image_size=8, channels=1),
        model=c.ModelConfig(base_channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=()),
        diffusion=c.DiffusionConfig(num_timesteps=30),
        train=c.TrainConfig(
            batch_size=8, num_steps=STEPS, log_every=10, checkpoint_every=EVERY, sample_every=EVERY, num_samples=4
        ),
        sampling=c.SamplingConfig(num_steps=3, spacing="trailing"),
    )
    train.train(config, str(folder / "run"))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
