"""Host to device: one global array a field, one batch ahead; and batches that are gathered on the device."""

import contextlib
from collections.abc import Generator, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.image_set import ImageSet


def device_batches(
    batches: Generator[dict[str, np.ndarray], None, None],
    sharding: jax.sharding.NamedSharding,
    resident: dict[str, jax.Array] | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Sends each process's share of every batch to its devices, one batch ahead of its use.

    Args:
        batches: this process's shares, from ``batches`` or ``index_batches``.
        sharding: of the first axis of the global batch.
        resident: arrays that lie on the devices already and join every batch, see ``put_images``.
    """

    def send(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        arrays = {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
        return arrays | (resident or {})

    with contextlib.closing(batches):
        ahead: dict[str, jax.Array] | None = None
        for batch in batches:
            now, ahead = ahead, send(batch)  # the transfer is asynchronous
            if now is not None:
                yield now
        if ahead is not None:
            yield ahead


def put_images(image_set: ImageSet, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """The whole set in the memory of every device, uint8: what ``gather`` takes its batches from."""
    arrays = {"images": image_set.images}
    if image_set.labels is not None:
        arrays["labels"] = image_set.labels
    return {name: jax.device_put(x, sharding) for name, x in arrays.items()}


def gather(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Inside a jitted step: {images [N H W C], index [B], flip [B]} -> {image [B H W C]}, as the host serves it."""
    images = batch["images"][batch["index"]]
    examples = {"image": jnp.where(batch["flip"][:, None, None, None], images[:, :, ::-1], images)}
    if "labels" in batch:
        examples["label"] = batch["labels"][batch["index"]]
    return examples
