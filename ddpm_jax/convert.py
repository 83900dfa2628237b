"""Other people's weights into a workdir, and a workdir's weights out to them.

    python -m ddpm_jax.convert from-diffusers google/ddpm-cifar10-32 --workdir runs/google   # or a folder
    python -m ddpm_jax.convert to-diffusers --workdir runs/flowers --out flowers_pipeline
    python -m ddpm_jax.convert from-ddpm model.npz --image_size 32 --workdir runs/ho

``sample``, ``train`` and every other program work on the workdir then. Fine-tuning begins at step 0 with a fresh
optimizer: ``python -m ddpm_jax.train --workdir runs/google --config.data.source=tfds:cifar10``.
"""

import dataclasses
import sys
from typing import Any

import jax
from absl import flags

from ddpm_jax import config as config_lib
from ddpm_jax import experiment, program
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.interop import ddpm, diffusers

FLAGS = flags.FLAGS
COMMANDS = {"from-diffusers": ("PATH",), "to-diffusers": (), "from-ddpm": ("PATH",)}


def define_flags() -> None:
    """The program's flags."""
    flags.DEFINE_string("workdir", None, "The run to write (from-…) or to read (to-…).")
    flags.DEFINE_string("out", None, "to-diffusers: the folder to write.")
    flags.DEFINE_enum(
        "weights", "ema", ["ema", "raw"], "to-diffusers: the average of the parameters, or the last ones."
    )
    flags.DEFINE_integer("step", None, "to-diffusers: checkpoint; the newest where left out.")
    flags.DEFINE_integer("image_size", None, "from-ddpm: height of the images, which the file does not tell.")


def main(command: str, *paths: str) -> None:
    """The program."""
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing; for example --workdir runs/google")
    if command == "from-diffusers":
        _from_diffusers(*paths)
    elif command == "to-diffusers":
        _to_diffusers()
    else:
        _from_ddpm(*paths)


def _from_diffusers(path: str) -> None:
    experiment.check_new_workdir(FLAGS.workdir)
    folder = diffusers.read_folder(path)
    unet = dict(folder.unet)
    config = _config(unet.pop("image_size"), unet.pop("channels"), unet, folder.diffusion, folder.sampling)
    pipeline = diffusers.load_folder(folder)
    _write(config, pipeline.params, pipeline.params)


def _from_ddpm(path: str) -> None:
    if not FLAGS.image_size:
        raise ConfigError("--image_size is missing: the height of the images, 32 for CIFAR-10")
    experiment.check_new_workdir(FLAGS.workdir)
    weights = ddpm.load_ddpm(path, image_size=FLAGS.image_size)
    unet = {field.name: getattr(weights.model, field.name) for field in dataclasses.fields(weights.model)}
    sampling = {"method": "ddpm", "num_steps": 1000, "variance": "fixed_large"}  # as Ho et al.
    config = _config(FLAGS.image_size, weights.channels, unet, {"schedule": "linear"}, sampling)
    _write(config, weights.params, weights.params if weights.ema_params is None else weights.ema_params)


def _config(
    image_size: int, channels: int, unet: dict[str, Any], diffusion: dict[str, Any], sampling: dict[str, Any]
) -> Config:
    """A run's config for a network from elsewhere; which images to fine-tune it on is for the user to say."""
    config = Config()
    config.data.source, config.data.image_size, config.data.channels = "", image_size, channels
    for section, values in ((config.model, unet), (config.diffusion, diffusion), (config.sampling, sampling)):
        for field in dataclasses.fields(section):
            if field.name in values:
                setattr(section, field.name, values[field.name])
    config_lib.validate(config)
    return config


def _write(config: Config, params: Any, ema_params: Any) -> None:
    experiment.write_run(FLAGS.workdir, config, params, ema_params)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{FLAGS.workdir}: {count:,} parameters; python -m ddpm_jax.sample --workdir {FLAGS.workdir}", file=sys.stderr
    )


def _to_diffusers() -> None:
    if not FLAGS.out:
        raise ConfigError("--out is missing: the folder to write, such as --out pipeline")
    run = experiment.load(FLAGS.workdir, weights=FLAGS.weights, step=FLAGS.step)
    config = run.config
    if config.data.normalizer != "none":
        raise ConfigError(
            f"config.data.normalizer={config.data.normalizer!r}: diffusers' pipelines know images in [-1, 1] only; "
            "this run cannot be written as one"
        )
    diffusers.save_pipeline(
        FLAGS.out,
        experiment.make_model(config),
        run.params,
        image_size=config.data.image_size,
        channels=config.data.channels,
        diffusion=dataclasses.asdict(config.diffusion),
        sampling=dataclasses.asdict(config.sampling),
    )
    print(f"{FLAGS.out}: load it with diffusers.DiffusionPipeline.from_pretrained({FLAGS.out!r})", file=sys.stderr)


if __name__ == "__main__":
    program.run(main, define_flags, COMMANDS, alone=True)
