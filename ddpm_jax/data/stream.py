"""Batches of a set that does not fit in host memory: read and decoded as they are served.

Like those of `batches` they are a function of (seed, step), so nothing is saved beside the checkpoints, and a run goes
on anywhere, on any number of processes, as if it had never stopped.
"""

import itertools
import os
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.decoding import import_tensorflow
from ddpm_jax.data.image_set import DataError, Encoded, ImageSet, Stream
from ddpm_jax.data.pipeline import Batch, ahead
from ddpm_jax.data.sources import check_fit, load, needs_tensorflow

# Decoded together, so many images or so many bytes; two such chunks lie ready.
_CHUNK_IMAGES, _CHUNK_BYTES = 1024, 32 * 2**20
_BATCH = 64  # images that tf.data hands over at once


def open_stream(
    source: str,
    *,
    image_size: int,
    channels: int,
    split: str = "train",
    data_dir: str | None = None,
    shuffle_buffer: int = 10_000,
) -> Stream:
    """Find the images of a source, and read none of them yet.

    A folder is shuffled whole, as `load` and `batches` would, since a list of its files fits in memory. TFDS's files
    are read from end to end, in another order every epoch, and each `shuffle_buffer` consecutive images are shuffled
    among themselves (`order.stream_indices`): a process holds what its rows need of two such windows, encoded.

    Args:
        source: `tfds:<name>` or `folder:<path>`.
        image_size, channels, split, data_dir: as of `load`.
        shuffle_buffer: images of TFDS that are shuffled together, >= 1.

    Raises:
        DataError: as of `load`, or the source is of another kind.
    """
    check_fit(image_size, channels)
    scheme, _, rest = source.partition(":")
    if not rest or not needs_tensorflow(source):
        raise DataError(f"data.source={source!r} is not streamed: use data.placement='host'")
    if scheme == "folder":
        from ddpm_jax.data.folder import open_folder

        return open_folder(source, Path(rest).expanduser(), image_size, channels)
    from ddpm_jax.data.records import open_records

    return open_records(source, rest, split, data_dir, (image_size, image_size, channels), shuffle_buffer)


def stream_batches(
    stream: Stream,
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    random_flip: bool = True,
    rows: np.ndarray | None = None,
    num_classes: int = 0,
) -> Generator[Batch, None, None]:
    """Serve the batches of steps first_step, first_step + 1, … without end, prepared ahead; as `batches` does.

    Args:
        stream: from `open_stream`.
        seed, batch_size, first_step, random_flip, rows: as of `batches`. Only `rows` are kept and decoded.
        num_classes: what the labels must be below; 0 serves none.

    Raises:
        DataError: the batch is empty or the set has no labels to serve; from the generator, an image or a label that
            cannot be used.
    """
    if batch_size < 1:
        raise DataError(f"train.batch_size={batch_size}: must be positive")
    if num_classes and not stream.has_labels:
        raise DataError(f"model.num_classes={num_classes}: data.source={stream.source!r} has no labels; use 0")
    mine = np.arange(batch_size) if rows is None else rows
    size = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // int(np.prod(stream.image_shape))) // len(mine))

    def serve() -> Generator[Batch, None, None]:
        closed = threading.Event()
        encoded_of = stream.follow(seed, batch_size, mine, first_step, closed)

        def make(start: int) -> list[Batch]:
            steps = range(start, start + size)
            flips = np.stack([stream.order(seed, step, batch_size)[1][mine] & random_flip for step in steps])
            images, labels = _decode(stream, _join([encoded_of(step) for step in steps]))
            images[flips.ravel()] = images[flips.ravel()][:, :, ::-1]
            batch: Batch = {"image": images}
            if num_classes and labels is not None:
                _check_labels(stream, labels, num_classes)
                batch["label"] = labels
            return [dict(zip(batch, parts, strict=True)) for parts in zip(*_split(batch, size), strict=True)]

        try:
            for chunk in ahead(make, itertools.count(first_step, size), 2):
                yield from chunk
        finally:
            closed.set()

    return serve()


def load_some(
    source: str,
    choose: Callable[[int], np.ndarray],
    *,
    streamed: bool,
    image_size: int,
    channels: int,
    split: str = "train",
    data_dir: str | None = None,
) -> ImageSet:
    """The images `choose(N)` of the N of a source; where it is streamed, no others are decoded or held in memory.

    Raises:
        DataError: as of `load`.
    """
    where: dict[str, Any] = {"image_size": image_size, "channels": channels, "split": split, "data_dir": data_dir}
    if not streamed or not needs_tensorflow(source):
        image_set = load(source, **where)
        chosen = choose(len(image_set.images))
        return ImageSet(image_set.images[chosen], None if image_set.labels is None else image_set.labels[chosen])
    stream = open_stream(source, **where)
    return ImageSet(*_decode(stream, stream.pick(np.asarray(choose(stream.num_images), np.int64))))


def _join(parts: list[Encoded]) -> Encoded:
    labels = [part.labels for part in parts if part.labels is not None]
    return Encoded(
        [image for part in parts for image in part.images],
        np.concatenate(labels) if labels else None,
        np.concatenate([part.indices for part in parts]),
    )


def _split(batch: Batch, size: int) -> list[np.ndarray]:
    return [x.reshape(size, -1, *x.shape[1:]) for x in batch.values()]


def _decode(stream: Stream, encoded: Encoded) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode images in parallel, uint8 [n H W C], and put others in the places of those that cannot be decoded."""
    tf = import_tensorflow()
    count = len(encoded.images)
    images, found = np.empty((count, *stream.image_shape), np.uint8), np.zeros(count, bool)
    # As objects: NumPy's own strings of bytes end at the last byte that is not zero.
    dataset = tf.data.Dataset.from_tensor_slices((np.arange(count), np.array(encoded.images, object)))
    dataset = dataset.map(lambda place, x: (place, stream.decode(x)), num_parallel_calls=os.cpu_count())
    for places, decoded in dataset.ignore_errors(log_warning=False).batch(_BATCH).prefetch(1).as_numpy_iterator():
        images[places], found[places] = decoded, True
    labels = None if encoded.labels is None else encoded.labels.copy()
    for place in np.flatnonzero(~found):
        images[place], near = stream.stand_in(int(encoded.indices[place]))
        if labels is not None and near != encoded.indices[place]:
            labels[place] = stream.pick(np.array([near])).labels[0]  # type: ignore[index]
    return images, labels


def _check_labels(stream: Stream, labels: np.ndarray, num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"model.num_classes={num_classes}: data.source={stream.source!r} has labels from {labels.min()} to "
            f"{labels.max()}; use {labels.max() + 1} or more"
        )
