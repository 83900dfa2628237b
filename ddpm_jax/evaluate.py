"""How good a trained run is: ``python -m ddpm_jax.evaluate likelihood --workdir runs/cifar10 --split test``.

likelihood: an upper bound of the bits a dimension that the run needs for images, in its three parts.
"""

import dataclasses
import json
import math
import os
from typing import Any

import jax
import numpy as np
from absl import flags

from ddpm_jax import data, diffusion, experiment, generate, images, normalizer, program, training
from ddpm_jax.compiler import use_cores
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.progress import progress

FLAGS = flags.FLAGS
COMMANDS = {"likelihood": ()}


def define_flags() -> None:
    """The program's flags."""
    flags.DEFINE_string("workdir", None, "The run to evaluate.")
    flags.DEFINE_string("out", None, "Where the numbers go, a JSON file; <workdir>/likelihood.json where left out.")
    flags.DEFINE_integer("num_images", 256, "How many, drawn at random from the split.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the choice of images and of their noise.", lower_bound=0, upper_bound=2**63 - 1)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest where left out.")
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The average of the parameters, or the last ones.")
    flags.DEFINE_string("source", None, "Of the images, such as npz:test.npz; the run's own data.source if left out.")
    flags.DEFINE_string("split", None, "Of a TFDS data set, such as test; the run's own data.split if left out.")
    flags.DEFINE_string("variance", None, "fixed_small, fixed_large or learned; the run's own where left out.")


def main(command: str) -> None:
    """The program."""
    use_cores(min(FLAGS.num_images, FLAGS.batch_size))
    {"likelihood": likelihood}[command]()


def likelihood() -> None:
    """Bits a dimension of images, on stdout and in a JSON file."""
    out = _checked_out()
    run = experiment.load(FLAGS.workdir or "", weights=FLAGS.weights, step=FLAGS.step)
    config = _with_overrides(run.config)
    image, label = _chosen_images(config)
    bound = bits_per_dim(run._replace(config=config), image, label, FLAGS.seed, FLAGS.batch_size)
    report = _report(bound, config)
    if jax.process_index() == 0:
        images.write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())
        mean, error, parts = report["bits_per_dim"], report["standard_error"], ("prior", "steps", "decoder")
        in_parts = ", ".join(f"{part} {report[part]:.4f}" for part in parts)
        print(f"{mean:.4f} +- {error:.4f} bits/dim of {FLAGS.num_images} images: {in_parts}; {out}")


def bits_per_dim(
    run: experiment.Run, image: np.ndarray, label: np.ndarray | None, seed: int, batch_size: int
) -> diffusion.Bound:
    """``diffusion.variational_bound`` of images, in batches over all devices, on the host.

    The bound of image i depends on (seed, i, image i) alone. Guidance plays no part: it has no likelihood.

    Args:
        run: with a config whose ``sampling.variance`` is that of the reverse process.
        image: uint8 [N H W C].
        label: int32 [N], for a network with classes.
        seed: of the noise.
        batch_size: images at a time, rounded up to a multiple of the devices.
    """
    sampling = dataclasses.replace(run.config.sampling, guidance=1.0)
    run = run._replace(config=dataclasses.replace(run.config, sampling=sampling))
    mesh = training.make_mesh()
    size = -(-min(batch_size, len(image)) // mesh.size) * mesh.size
    firsts = range(0, len(image), size)
    sharding = training.batch_sharding(mesh)
    key, parts = jax.random.key(seed), []
    # Jitted: only what is computed there lies on the devices of other processes, too.
    keys_of = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)), out_shardings=sharding)
    total = len(firsts) * run.schedule.num_timesteps
    with progress(total, "likelihood", "step") as bar:
        for first in firsts:
            # The last batch repeats its last image, so that it compiles nothing new.
            numbers = np.minimum(np.arange(first, first + size), len(image) - 1)
            keys = keys_of(key, jax.device_put(numbers, sharding))
            labels = None if label is None else jax.device_put(label[numbers], sharding)
            x0 = normalizer.normalize(experiment.make_normalizer(run.config), jax.device_put(image[numbers], sharding))
            bound = _bound(run, x0, keys, labels, lambda _: bar.update(1))
            parts.append(jax.tree.map(generate.fetch, bound))
    joined: list[Any] = [np.concatenate(part, axis=-1)[..., : len(image)] for part in zip(*parts, strict=True)]
    return diffusion.Bound(*joined)


def _bound(run: experiment.Run, x0: Any, keys: Any, labels: Any, on_step: Any) -> diffusion.Bound:
    options = experiment.sampling_options(run.config)
    return diffusion.variational_bound(
        experiment.conditioned(run.denoise_fn, run.config, labels),
        run.schedule,
        x0,
        keys,
        variance=options["variance"],
        prediction=options["prediction"],
        clip_x0=options["clip_x0"],
        bounds=normalizer.clip_bounds(experiment.make_normalizer(run.config)),
        on_step=on_step,
        compiler_options=options["compiler_options"],
    )


def _checked_out() -> str:
    """Before anything is loaded."""
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: the run to evaluate, such as --workdir runs/digits")
    out = FLAGS.out or os.path.join(FLAGS.workdir, "likelihood.json")
    try:
        images.check_suffix(out, ".json")
    except ValueError as error:
        raise ConfigError(f"--out={error}") from None
    return out


def _with_overrides(config: Config) -> Config:
    if FLAGS.source is not None:
        config.data.source = FLAGS.source
    if FLAGS.split is not None:
        if not config.data.source.startswith("tfds:"):
            raise ConfigError(
                f"--split={FLAGS.split}: data.source={config.data.source!r} has one split only; leave it out"
            )
        config.data.split = FLAGS.split
    learned = config.diffusion.learned_variance
    config.sampling.variance = FLAGS.variance or ("learned" if learned else config.sampling.variance)
    try:
        diffusion.check_variance(config.sampling.variance, learned)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    return config


def _chosen_images(config: Config) -> tuple[np.ndarray, np.ndarray | None]:
    """The images and, for a network with classes, their labels: a random choice, the same for the same seed."""
    settings = config.data

    def choose(count: int) -> np.ndarray:
        if FLAGS.num_images > count:
            raise ConfigError(f"--num_images={FLAGS.num_images}: there are {count} in data.source={settings.source!r}")
        return data.batch_indices(FLAGS.seed, 0, FLAGS.num_images, count)[0]

    image_set = data.load_some(
        settings.source,
        choose,
        streamed=settings.placement == "stream",
        image_size=settings.image_size,
        channels=settings.channels,
        split=settings.split,
        data_dir=settings.data_dir,
    )
    if not config.model.num_classes:
        return image_set.images, None
    if image_set.labels is None or image_set.labels.max() >= config.model.num_classes:
        raise ConfigError(
            f"--source={settings.source}: this run's network needs a label below {config.model.num_classes} an image; "
            "choose another source"
        )
    return image_set.images, image_set.labels


def _report(bound: diffusion.Bound, config: Config) -> dict[str, Any]:
    """Means over the images; the standard error is that of the choice of images and of their noise."""
    total = bound.total
    return {
        "bits_per_dim": float(total.mean()),
        "standard_error": float(total.std(ddof=1) / math.sqrt(len(total))) if len(total) > 1 else 0.0,
        "prior": float(bound.prior.mean()),
        "steps": float(bound.per_step[1:].sum(0).mean()),
        "decoder": float(bound.per_step[0].mean()),
        "per_step": [float(x) for x in bound.per_step.mean(1)],
        "num_images": len(total),
        "source": config.data.source,
        "split": config.data.split if config.data.source.startswith("tfds:") else None,
        "weights": FLAGS.weights,
        "step": FLAGS.step,
        "variance": config.sampling.variance,
        "seed": FLAGS.seed,
    }


if __name__ == "__main__":
    program.run(main, define_flags, COMMANDS)
