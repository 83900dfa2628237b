"""Draws pictures from a trained run: ``python -m ddpm_jax.sample --workdir runs/flowers --out flowers.png``.

A flag left out takes the run's own ``sampling.*``. The same seed gives the same pictures whatever the batch size and
the number of devices.
"""

import sys

import jax
import numpy as np
from absl import flags
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import experiment, generate, images, program, training
from ddpm_jax.compiler import use_cores
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.progress import progress

FLAGS = flags.FLAGS
_GIF_FRAMES = 40
_MAX_GIF_IMAGES = 64

_SAMPLING_FLAGS = [
    "method",
    "num_steps",
    "eta",
    "spacing",
    "steps_offset",
    "end",
    "variance",
    "clip_x0",
    "clip_range",
    "dynamic_threshold",
    "max_threshold",
    "rederive_eps",
    "guidance",
]


def define_flags() -> None:
    """The program's flags; those of ``_SAMPLING_FLAGS`` stand for the config's fields of these names."""
    flags.DEFINE_string("workdir", None, "The run to sample from.")
    flags.DEFINE_string("out", None, "Picture to write, a PNG: a grid of all images, a row a class.")
    flags.DEFINE_string("npz", None, "Also write `images`, uint8 [N H W C], and `labels` where there are classes.")
    flags.DEFINE_string("gif", None, f"Also write how the first images emerge (at most {_MAX_GIF_IMAGES}).")
    flags.DEFINE_integer("num_images", 64, "How many.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the pictures.", lower_bound=0, upper_bound=2**63 - 1)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest where left out.")
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The average of the parameters, or the last ones.")
    flags.DEFINE_integer("label", None, "Class of all images; where left out the classes take turns.")
    flags.DEFINE_string("method", None, "ddim, ddpm, dpm++ or heun.")
    flags.DEFINE_integer("num_steps", None, "Steps of the chain: as many network calls, or 2 S - 1 for heun.")
    flags.DEFINE_float("eta", None, "Noise of ddim, 0 .. 1.")
    flags.DEFINE_string("spacing", None, "leading, trailing, linspace or quadratic.")
    flags.DEFINE_integer("steps_offset", None, "Added to the timesteps of the spacing leading.")
    flags.DEFINE_string("end", None, "clean, or first: ddim stops at the noise level of t = 0.")
    flags.DEFINE_string("variance", None, "Of ddpm: fixed_small, fixed_large or learned.")
    flags.DEFINE_bool("clip_x0", None, "Clip predicted images to [-clip_range, clip_range].")
    flags.DEFINE_float("clip_range", None, "Of clip_x0; images lie in [-1, 1].")
    flags.DEFINE_float("dynamic_threshold", None, "Clip at this quantile of each image and scale back; 0 is off.")
    flags.DEFINE_float("max_threshold", None, "Cap of what dynamic_threshold clips at; 0 is none.")
    flags.DEFINE_bool("rederive_eps", None, "After clipping, take the noise from the clipped image.")
    flags.DEFINE_float("guidance", None, "out_null + guidance (out_label - out_null); 1 is none.")


def main() -> None:
    """The program."""
    _check_flags()
    use_cores(min(FLAGS.num_images, FLAGS.batch_size))
    run = experiment.load(FLAGS.workdir or "", weights=FLAGS.weights, step=FLAGS.step)
    config = _with_overrides(run.config)
    _check_label(config)
    mesh = training.make_mesh()
    batches = generate.num_batches(FLAGS.num_images, FLAGS.batch_size, mesh)
    with progress(batches * config.sampling.num_steps, "sampling", "step") as bar:
        drawn = generate.draw(
            config,
            run.schedule,
            run.denoise_fn,
            mesh,
            num_images=FLAGS.num_images,
            seed=FLAGS.seed,
            batch_size=FLAGS.batch_size,
            label=FLAGS.label,
            on_step=lambda _: bar.update(1),
        )
    frames = _gif_frames(config, run, mesh) if FLAGS.gif else []
    if jax.process_index() == 0:
        _write(drawn, generate.labels_of(config, np.arange(len(drawn), dtype=np.int32), FLAGS.label), frames)


def _check_flags() -> None:
    """Before anything is loaded: what is missing or would fail only when hours of sampling are over."""
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: the run to sample from, such as --workdir runs/digits")
    if not FLAGS.out and not FLAGS.npz and not FLAGS.gif:
        raise ConfigError("--out is missing: the picture to write, such as --out samples.png")
    try:
        for path, suffix in ((FLAGS.out, ".png"), (FLAGS.npz, ".npz"), (FLAGS.gif, ".gif")):
            if path:
                images.check_suffix(path, suffix)
                epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def _with_overrides(config: Config) -> Config:
    for field in _SAMPLING_FLAGS:
        if FLAGS[field].value is not None:
            setattr(config.sampling, field, FLAGS[field].value)
    # The run's own eta and end belong to the run's own method, its offset to its own spacing.
    if FLAGS.method not in (None, "ddim"):
        config.sampling.eta = FLAGS.eta or 0.0
        config.sampling.end = FLAGS.end or "clean"
    if FLAGS.spacing not in (None, "leading"):
        config.sampling.steps_offset = FLAGS.steps_offset or 0
    config_lib.validate(config)
    return config


def _check_label(config: Config) -> None:
    num_classes = config.model.num_classes
    if FLAGS.label is not None and not 0 <= FLAGS.label < num_classes:
        remedy = (
            f"choose 0 .. {num_classes - 1}" if num_classes else "this run was trained without labels; leave it out"
        )
        raise ConfigError(f"--label={FLAGS.label}: {remedy}")


def _gif_frames(config: Config, run: experiment.Run, mesh: jax.sharding.Mesh) -> list[np.ndarray]:
    chain = generate.draw_chain(
        config,
        run.schedule,
        run.denoise_fn,
        mesh,
        num_images=min(FLAGS.num_images, FLAGS.batch_size, _MAX_GIF_IMAGES),
        num_frames=_GIF_FRAMES,
        seed=FLAGS.seed,
        label=FLAGS.label,
    )
    return [images.grid(frame) for frame in chain]


def _write(drawn: np.ndarray, labels: np.ndarray | None, frames: list[np.ndarray]) -> None:
    if FLAGS.out:
        images.save_png(FLAGS.out, _grid(drawn, labels))
    if FLAGS.npz:
        images.save_npz(FLAGS.npz, images=drawn, **({} if labels is None else {"labels": labels}))
    if FLAGS.gif:
        images.save_gif(FLAGS.gif, frames)
    written = ", ".join(path for path in (FLAGS.out, FLAGS.npz, FLAGS.gif) if path)
    print(f"{len(drawn)} images: {written}", file=sys.stderr)


def _grid(drawn: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """A row a class where the classes come in equal numbers."""
    if labels is None or FLAGS.label is not None or len(drawn) % (classes := len(np.unique(labels))):
        return images.grid(drawn)
    return images.grid(drawn[np.argsort(labels, kind="stable")], columns=len(drawn) // classes)


if __name__ == "__main__":
    program.run(main, define_flags)
