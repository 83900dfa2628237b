"""Draws pictures from a trained run: ``python -m ddpm_jax.sample --workdir runs/flowers --out flowers.png``.

A flag left out takes the run's own ``sampling.*``. The same seed gives the same pictures whatever the batch size and
the number of devices.
"""

import sys

import jax
import numpy as np
from absl import flags

from ddpm_jax import config as config_lib
from ddpm_jax import experiment, generate, images, program, training
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.progress import progress

_GIF_FRAMES = 40
_MAX_GIF_IMAGES = 64

_WORKDIR = flags.DEFINE_string("workdir", None, "The run to sample from.")
_OUT = flags.DEFINE_string("out", None, "Picture to write, a PNG: a grid of all images.")
_NPZ = flags.DEFINE_string("npz", None, "Also write the images as `images`, uint8 [N H W C].")
_GIF = flags.DEFINE_string("gif", None, f"Also write how the first images emerge (at most {_MAX_GIF_IMAGES}).")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "How many.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the pictures.", lower_bound=0)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest where left out.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The average of the parameters, or the last ones.")
_LABEL = flags.DEFINE_integer("label", None, "Class of all images; where left out the classes take turns.")
_OVERRIDES = {
    "method": flags.DEFINE_string("method", None, "ddim or ddpm."),
    "num_steps": flags.DEFINE_integer("num_steps", None, "Network calls."),
    "eta": flags.DEFINE_float("eta", None, "Noise of ddim, 0 .. 1."),
    "spacing": flags.DEFINE_string("spacing", None, "leading, trailing, linspace or quadratic."),
    "variance": flags.DEFINE_string("variance", None, "Of ddpm: fixed_small or fixed_large."),
    "clip_x0": flags.DEFINE_bool("clip_x0", None, "Clip predicted images to [-1, 1]."),
    "rederive_eps": flags.DEFINE_bool("rederive_eps", None, "After clipping, take the noise from the clipped image."),
    "guidance": flags.DEFINE_float("guidance", None, "out_null + guidance (out_label - out_null); 1 is none."),
}


def main() -> None:
    """The program."""
    _check_flags()
    run = experiment.load(_WORKDIR.value or "", weights=_WEIGHTS.value, step=_STEP.value)
    config = _with_overrides(run.config)
    _check_label(config)
    mesh = training.make_mesh()
    batches = generate.num_batches(_NUM_IMAGES.value, _BATCH_SIZE.value, mesh)
    with progress(batches * config.sampling.num_steps, "sampling", "step", disable=jax.process_index() != 0) as bar:
        drawn = generate.draw(
            config,
            run.schedule,
            run.denoise_fn,
            mesh,
            num_images=_NUM_IMAGES.value,
            seed=_SEED.value,
            batch_size=_BATCH_SIZE.value,
            label=_LABEL.value,
            on_step=lambda _: bar.update(1),
        )
    frames = _gif_frames(config, run, mesh) if _GIF.value else []
    if jax.process_index() == 0:
        _write(drawn, frames)


def _check_flags() -> None:
    """Before anything is loaded: what is missing or would fail only when hours of sampling are over."""
    if not _WORKDIR.value:
        raise ConfigError("--workdir is missing: the run to sample from, such as --workdir runs/digits")
    if not _OUT.value and not _NPZ.value and not _GIF.value:
        raise ConfigError("--out is missing: the picture to write, such as --out samples.png")
    try:
        for path, suffix in ((_OUT.value, ".png"), (_NPZ.value, ".npz"), (_GIF.value, ".gif")):
            if path:
                images.check_suffix(path, suffix)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _with_overrides(config: Config) -> Config:
    for field, flag in _OVERRIDES.items():
        if flag.value is not None:
            setattr(config.sampling, field, flag.value)
    if _OVERRIDES["method"].value not in (None, "ddim") and _OVERRIDES["eta"].value is None:
        config.sampling.eta = 0.0  # the run's own eta belongs to the run's own method
    config_lib.validate(config)
    return config


def _check_label(config: Config) -> None:
    num_classes = config.model.num_classes
    if _LABEL.value is not None and not 0 <= _LABEL.value < num_classes:
        remedy = (
            f"choose 0 .. {num_classes - 1}" if num_classes else "this run was trained without labels; leave it out"
        )
        raise ConfigError(f"--label={_LABEL.value}: {remedy}")


def _gif_frames(config: Config, run: experiment.Run, mesh: jax.sharding.Mesh) -> list[np.ndarray]:
    chain = generate.draw_chain(
        config,
        run.schedule,
        run.denoise_fn,
        mesh,
        num_images=min(_NUM_IMAGES.value, _MAX_GIF_IMAGES),
        num_frames=_GIF_FRAMES,
        seed=_SEED.value,
        label=_LABEL.value,
    )
    return [images.grid(frame) for frame in chain]


def _write(drawn: np.ndarray, frames: list[np.ndarray]) -> None:
    if _OUT.value:
        images.save_png(_OUT.value, images.grid(drawn))
    if _NPZ.value:
        images.save_npz(_NPZ.value, images=drawn)
    if _GIF.value:
        images.save_gif(_GIF.value, frames)
    written = ", ".join(path for path in (_OUT.value, _NPZ.value, _GIF.value) if path)
    print(f"{len(drawn)} images: {written}", file=sys.stderr)


if __name__ == "__main__":
    program.run(main)
