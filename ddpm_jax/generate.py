"""Pictures from a denoiser: drawn in batches over all devices, each a function of the seed and its own number."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.tree_util import Partial

from ddpm_jax import diffusion, experiment, normalizer, training
from ddpm_jax.config import Config

_PICTURES = 0x1DEA  # folded into the key, so that no picture meets the noise that its run was trained with


def draw(
    config: Config,
    schedule: diffusion.Schedule,
    denoise_fn: Partial,
    mesh: Mesh,
    *,
    num_images: int,
    seed: int,
    batch_size: int | None = None,
    label: int | None = None,
    on_step: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Images 0 .. num_images - 1 of a seed, uint8 [N H W C].

    Image i starts from noise of its own and meets noise of its own, so it depends on (seed, i) alone, and not on how
    many are drawn, in which batches, or on how many devices.

    Args:
        config: what was trained, and how to sample it (``sampling``).
        schedule: the noise schedule.
        denoise_fn: ``denoise_fn(x_t, t[, label])``.
        mesh: the devices to spread each batch over.
        num_images: N.
        seed: of the pictures.
        batch_size: images at a time, rounded up to a multiple of the devices; None is all of them.
        label: the class of all; None cycles through the classes where the network has any.
        on_step: see ``diffusion.sample``; called ``num_batches * sampling.num_steps`` times.
    """
    options = experiment.sampling_options(config) | {"on_step": on_step}
    parts = []
    for x_T, keys, labels in _batches(config, mesh, num_images, seed, batch_size, label):
        x0 = diffusion.sample(experiment.conditioned(denoise_fn, config, labels), schedule, x_T, keys, **options)
        parts.append(fetch(to_uint8(config, x0)))
    return np.concatenate(parts)[:num_images]


def draw_chain(
    config: Config,
    schedule: diffusion.Schedule,
    denoise_fn: Partial,
    mesh: Mesh,
    *,
    num_images: int,
    num_frames: int,
    seed: int,
    label: int | None = None,
) -> np.ndarray:
    """How the first images of ``draw`` emerge: x_t at ``num_frames`` even steps, then x0; uint8 [F + 1 N H W C]."""
    options = experiment.sampling_options(config)
    num_frames = min(num_frames, options["num_steps"])
    x_T, keys, labels = noises(config, mesh, num_images=num_images, seed=seed, label=label)
    x0, trajectory = diffusion.sample(
        experiment.conditioned(denoise_fn, config, labels), schedule, x_T, keys, trajectory=num_frames, **options
    )
    frames = to_uint8(config, jnp.concatenate([trajectory.x_t, x0[None]]))
    return np.asarray(fetch(frames)[:, :num_images])


def labels_of(config: Config, numbers: np.ndarray, label: int | None = None) -> np.ndarray | None:
    """The classes of images by their numbers, int32: ``label``, or the classes in turn; None where there are none."""
    if not config.model.num_classes:
        return None
    return numbers % config.model.num_classes if label is None else np.full_like(numbers, label)


def noises(
    config: Config, mesh: Mesh, *, num_images: int, seed: int, label: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(x_T, keys, labels) that the first images of ``draw`` start from, at least ``num_images`` of each.

    There are more where the devices do not divide them.
    """
    return next(_batches(config, mesh, num_images, seed, None, label))


def to_uint8(config: Config, x0: np.ndarray | jax.Array) -> jax.Array:
    """uint8 images of x0 in the run's own units."""
    return normalizer.denormalize(experiment.make_normalizer(config), jnp.asarray(x0))


def to_x0(config: Config, pixels: np.ndarray) -> jax.Array:
    """x0 in the run's own units of uint8 images."""
    return normalizer.normalize(experiment.make_normalizer(config), pixels)


def num_batches(num_images: int, batch_size: int | None, mesh: Mesh) -> int:
    """How many batches ``draw`` needs."""
    return -(-num_images // _batch_size(num_images, batch_size, mesh))


def _batch_size(num_images: int, batch_size: int | None, mesh: Mesh) -> int:
    return -(-min(batch_size or num_images, num_images) // mesh.size) * mesh.size


def _batches(
    config: Config, mesh: Mesh, num_images: int, seed: int, batch_size: int | None, label: int | None
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array | None]]:
    """(x_T, keys, labels) of each batch; the last is as long as the others, so that it compiles nothing new."""
    size = _batch_size(num_images, batch_size, mesh)
    sharding = training.batch_sharding(mesh)
    start = jax.jit(_start, static_argnums=2, out_shardings=sharding)
    key = jax.random.fold_in(jax.random.key(seed), _PICTURES)
    for first in range(0, num_images, size):
        numbers = np.arange(first, first + size, dtype=np.int32)
        x_T, keys = start(key, jax.device_put(numbers, sharding), experiment.image_shape(config))
        wanted = labels_of(config, numbers, label)
        yield x_T, keys, None if wanted is None else jax.device_put(wanted, sharding)


def _start(key: jax.Array, numbers: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    def one(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        start_key, chain_key = jax.random.split(jax.random.fold_in(key, number))
        return jax.random.normal(start_key, shape), chain_key

    return jax.vmap(one)(numbers)


def fetch(x: jax.Array) -> Any:
    """The whole array on the host, also where other processes hold parts of it."""
    return jax.device_get(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
