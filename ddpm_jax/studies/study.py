"""What the studies share: their result, and chains and inversions from a batch on the devices."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, experiment, generate, images, training
from ddpm_jax.config import Config
from ddpm_jax.progress import progress

OnStep = Callable[[int], object]


class Study(NamedTuple):
    """Pictures in labelled rows and columns, and numbers, ready for JSON."""

    pictures: np.ndarray  # uint8 [R C H W channels]
    rows: list[str]
    columns: list[str]
    numbers: dict[str, Any]
    summary: str  # a line, or a few
    frames: np.ndarray | None = None  # uint8 [F N H W channels], where something moves


class Start(NamedTuple):
    """A batch of noise to sample from, spread over the devices; whose number they do not divide, it is longer."""

    x_T: jax.Array
    keys: jax.Array  # one, or one an image
    labels: jax.Array | None
    num_images: int


def drawn_start(run: experiment.Run, num_images: int, seed: int, label: int | None = None) -> Start:
    """The noises of the first pictures that ``sample`` draws with a seed; without a label the classes take turns."""
    mesh = training.make_mesh()
    return Start(*generate.noises(run.config, mesh, num_images=num_images, seed=seed, label=label), num_images)


def given_start(x: np.ndarray, labels: np.ndarray | None = None) -> Start:
    """A batch that is there already: noise, or images to be inverted; its chains have no noise of their own."""
    mesh = training.make_mesh()
    numbers = np.minimum(np.arange(-(-len(x) // mesh.size) * mesh.size), len(x) - 1)
    sharding = training.batch_sharding(mesh)
    placed = None if labels is None else jax.device_put(np.asarray(labels, np.int32)[numbers], sharding)
    return Start(jax.device_put(np.asarray(x)[numbers], sharding), jax.random.key(0), placed, len(x))


def with_sampling(config: Config, **fields: Any) -> Config:
    """A copy with other ``sampling.*``, checked; what belongs to the method, spacing or clipping left behind goes too.

    Raises:
        ConfigError: a value that cannot work.
    """
    config = copy.deepcopy(config)
    sampling = config.sampling
    for name, value in fields.items():
        setattr(sampling, name, value)
    if sampling.method != "ddim":
        sampling.eta, sampling.end = fields.get("eta", 0.0), fields.get("end", "clean")
    if sampling.spacing != "leading":
        sampling.steps_offset = 0
    elif "steps_offset" not in fields:  # the run's own is of its own number of steps
        T, S = config.diffusion.num_timesteps, min(sampling.num_steps, config.diffusion.num_timesteps)
        sampling.steps_offset = min(sampling.steps_offset, T - 1 - (S - 1) * (T // S))
    if not sampling.clip_x0:
        sampling.dynamic_threshold = sampling.max_threshold = 0.0
    config_lib.validate(config)
    return config


def decode(run: experiment.Run, start: Start, on_step: OnStep | None = None, **fields: Any) -> np.ndarray:
    """x0 of a chain from ``start``, float32 [N H W C] on the host; ``fields`` are other ``sampling.*``."""
    config = with_sampling(run.config, **fields)
    x0 = diffusion.sample(
        experiment.conditioned(run.denoise_fn, config, start.labels),
        run.schedule,
        start.x_T,
        start.keys,
        on_step=on_step,
        **experiment.sampling_options(config),
    )
    return np.asarray(generate.fetch(x0))[: start.num_images]


def encode(run: experiment.Run, start: Start, on_step: OnStep | None = None, **fields: Any) -> np.ndarray:
    """x_T of the images that ``start`` holds in place of noise, by DDIM inversion; otherwise as ``decode``."""
    config = with_sampling(run.config, method="ddim", eta=0.0, clip_x0=False, **fields)
    options = experiment.sampling_options(config)
    x_T = diffusion.invert(
        experiment.conditioned(run.denoise_fn, config, start.labels),
        run.schedule,
        start.x_T,
        on_step=on_step,
        **{name: options[name] for name in ("num_steps", "spacing", "plan", "prediction", "compiler_options")},
    )
    return np.asarray(generate.fetch(x_T))[: start.num_images]


def new_bar(total: int, name: str) -> tqdm:
    """A progress bar, on the first process."""
    return progress(total, name, "step")


def tick(bar: tqdm) -> OnStep:
    """What moves a bar by one step of a chain."""
    return lambda _: bar.update(1)


def rms(x: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    """Root mean square over some axes, in float64."""
    return np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=axis))


def image_names(start: Start) -> list[str]:
    """A label an image: its class where it has one."""
    if start.labels is None:
        return [f"image {i}" for i in range(start.num_images)]
    return [f"class {i}" for i in np.asarray(generate.fetch(start.labels))[: start.num_images]]


def pixels_of(config: Config, x0: np.ndarray | jax.Array) -> np.ndarray:
    """uint8 images of x0 in the run's own units."""
    return np.asarray(generate.to_uint8(config, x0))


def tiled(pictures: np.ndarray) -> np.ndarray:
    """uint8 [R C N H W ch] -> [R C H' W' ch]: the N of a cell in a square, a gray line between them."""
    return np.stack(
        [
            np.stack([images.grid(cell, padding=1, background=128, scale=1)[1:-1, 1:-1] for cell in row])
            for row in pictures
        ]
    )
