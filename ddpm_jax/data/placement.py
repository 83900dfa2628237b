"""Host to device: one global array a field, one batch ahead; and batches that are gathered on the device."""

import contextlib
from collections.abc import Collection, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.image_set import ImageSet


def local_rows(
    sharding: jax.sharding.Sharding, batch_size: int, devices: Collection[jax.Device] | None = None
) -> np.ndarray:
    """The rows of a global batch that lie on this process's devices, ascending, int64 [b].

    Read from the sharding, because a mesh may order the devices of a TPU slice as its wires run, and not by process.

    Args:
        sharding: of the first axis of the batch.
        batch_size: of the GLOBAL batch.
        devices: whose rows; None is this process's.
    """
    index_of: Any = sharding.devices_indices_map((batch_size,))
    mine = [index_of[device][0] for device in (sharding.addressable_devices if devices is None else devices)]
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in mine]))


def device_batches(
    batches: Generator[dict[str, np.ndarray], None, None],
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    resident: dict[str, jax.Array] | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Sends each process's rows of every batch to its devices, one batch ahead of its use.

    Args:
        batches: this process's rows, ``local_rows(sharding, batch_size)``, from ``batches`` or ``index_batches``.
        sharding: of the first axis of the global batch.
        batch_size: of the GLOBAL batch.
        resident: arrays that lie on the devices already and join every batch, see ``put_images``.
    """
    rows = local_rows(sharding, batch_size)

    def place(x: np.ndarray) -> jax.Array:
        def block(index: Any) -> np.ndarray:
            return block_of(x, rows, index[0])

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, block)

    def send(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        arrays = {name: place(x) for name, x in batch.items()}
        return arrays | (resident or {})

    with contextlib.closing(batches):
        ahead: dict[str, jax.Array] | None = None
        for batch in batches:
            now, ahead = ahead, send(batch)  # the transfer is asynchronous
            if now is not None:
                yield now
        if ahead is not None:
            yield ahead


def block_of(x: np.ndarray, rows: np.ndarray, index: slice) -> np.ndarray:
    """What one device holds of a global batch, out of the rows of its process: x[i] is row rows[i]."""
    start, stop = np.searchsorted(rows, [index.start or 0, rows[-1] + 1 if index.stop is None else index.stop])
    return x[start:stop]


def put_images(image_set: ImageSet, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """The whole set in the memory of every device, uint8: what ``gather`` takes its batches from."""
    arrays = {"images": image_set.images}
    if image_set.labels is not None:
        arrays["labels"] = image_set.labels
    # Not device_put, with which several processes send each other the whole set to compare it.
    return {name: _put(x, sharding) for name, x in arrays.items()}


def _put(x: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def gather(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Inside a jitted step: {images [N H W C], index [B], flip [B]} -> {image [B H W C]}, as the host serves it."""
    images = batch["images"][batch["index"]]
    examples = {"image": jnp.where(batch["flip"][:, None, None, None], images[:, :, ::-1], images)}
    if "labels" in batch:
        examples["label"] = batch["labels"][batch["index"]]
    return examples
