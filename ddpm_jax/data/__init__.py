"""Images in: sources, their order, and host batches. The only room that imports TensorFlow, and late."""

from ddpm_jax.data.image_set import DataError, ImageSet, Stream, read_picture
from ddpm_jax.data.order import batch_indices, stream_indices
from ddpm_jax.data.pipeline import batches, index_batches
from ddpm_jax.data.placement import device_batches, gather, local_rows, put_images
from ddpm_jax.data.sources import load, needs_tensorflow
from ddpm_jax.data.stream import load_some, open_stream, stream_batches

__all__ = [
    "DataError",
    "ImageSet",
    "Stream",
    "batch_indices",
    "batches",
    "device_batches",
    "gather",
    "index_batches",
    "load",
    "load_some",
    "local_rows",
    "needs_tensorflow",
    "open_stream",
    "put_images",
    "read_picture",
    "stream_batches",
    "stream_indices",
]
