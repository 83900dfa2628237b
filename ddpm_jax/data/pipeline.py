"""From an image set to endless host batches, each a function of (seed, step) and of nothing else."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ddpm_jax.data.decoding import as_tensor, import_tensorflow
from ddpm_jax.data.image_set import DataError, ImageSet
from ddpm_jax.data.order import batch_indices

Batch = dict[str, np.ndarray]
_T = TypeVar("_T")
_AHEAD = 4  # batches prepared before they are asked for
_CHUNK = 256  # steps whose order tf.data gets at once

# (step) -> (indices int64 [b], flips bool [b]) of the rows to serve
_Order = Callable[[int], tuple[np.ndarray, np.ndarray]]


def batches(
    image_set: ImageSet,
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    random_flip: bool = True,
    rows: np.ndarray | None = None,
    use_tensorflow: bool = False,
) -> Generator[Batch, None, None]:
    """Serve the batches of steps first_step, first_step + 1, … without end, prepared a few ahead.

    Both servers, tf.data and NumPy, serve the same bytes. Close it, or drop it, to stop its thread.

    Args:
        image_set: uint8 images [N H W C] and labels; read in place, so do not write to it meanwhile.
        seed: of the run, >= 0.
        batch_size: of the GLOBAL batch.
        first_step: the optimizer step to begin with, as after a resume.
        random_flip: mirror half of the images, others in every epoch; the order of the images is the same without.
        rows: which rows of each global batch to serve, int [b], as from `local_rows`; None is all.
        use_tensorflow: serve through tf.data, otherwise by a NumPy thread, which imports no TensorFlow.

    Returns:
        Generator of dict(image=uint8 [b H W C], label=int32 [b]), C-contiguous; `label` is absent where the set has
        none.

    Raises:
        DataError: the set or the batch is empty.
    """
    order = _order(len(image_set.images), seed, batch_size, random_flip, rows)
    serve = _serve_with_tensorflow if use_tensorflow else _serve_with_numpy
    return serve(image_set, order, first_step)


def index_batches(
    num_images: int,
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    random_flip: bool = True,
    rows: np.ndarray | None = None,
) -> Generator[Batch, None, None]:
    """Serve the order alone, for a set that lies on the device: dict(index=int32 [b], flip=bool [b]).

    Image i of `batches` with the same arguments is image `index[i]`, mirrored left to right where `flip[i]`.
    Arguments and errors are those of `batches`.
    """
    order = _order(num_images, seed, batch_size, random_flip, rows)

    def serve() -> Generator[Batch, None, None]:
        for indices, flips in map(order, itertools.count(first_step)):
            yield {"index": indices.astype(np.int32), "flip": flips}

    return serve()


def _order(num_images: int, seed: int, batch_size: int, random_flip: bool, rows: np.ndarray | None) -> _Order:
    if num_images < 1:
        raise DataError("data.source holds no image: give a source or a split that has at least one")
    if batch_size < 1:
        raise DataError(f"train.batch_size={batch_size}: must be positive")
    mine: Any = slice(None) if rows is None else rows

    def order(step: int) -> tuple[np.ndarray, np.ndarray]:
        indices, flips = batch_indices(seed, step, batch_size, num_images)
        return indices[mine], flips[mine] & random_flip

    return order


def _serve_with_numpy(image_set: ImageSet, order: _Order, first_step: int) -> Generator[Batch, None, None]:
    def make(step: int) -> Batch:
        indices, flips = order(step)
        images = np.take(image_set.images, indices, axis=0)
        images[flips] = images[flips][:, :, ::-1]
        return {"image": images} if image_set.labels is None else {"image": images, "label": image_set.labels[indices]}

    return ahead(make, itertools.count(first_step), _AHEAD)


def _serve_with_tensorflow(image_set: ImageSet, order: _Order, first_step: int) -> Generator[Batch, None, None]:
    tf = import_tensorflow()
    tensors = {"image": as_tensor(image_set.images)}
    if image_set.labels is not None:
        tensors["label"] = as_tensor(image_set.labels)

    def gather(indices: Any, flips: Any) -> dict[str, Any]:
        batch = {name: tf.gather(tensor, indices) for name, tensor in tensors.items()}
        mirrored = tf.reverse(batch["image"], axis=[2])
        return batch | {"image": tf.where(flips[:, None, None, None], mirrored, batch["image"])}

    # The order goes in as a table, many steps at a time: a Python generator inside tf.data hangs programs that exit.
    def make(start: int) -> Iterator[Batch]:
        orders = [order(step) for step in range(start, start + _CHUNK)]
        table = tuple(np.stack(column) for column in zip(*orders, strict=True))
        dataset = tf.data.Dataset.from_tensor_slices(table)
        dataset = dataset.map(gather, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return dataset.prefetch(_AHEAD).as_numpy_iterator()

    for chunk in ahead(make, itertools.count(first_step, _CHUNK), 1):
        yield from chunk


def ahead(make: Callable[[int], _T], arguments: Iterator[int], count: int) -> Generator[_T, None, None]:
    """Map `make` over endless arguments, in one background thread that keeps `count` results ready.

    There is no thread that loops, so nothing runs on when the consumer stops: the pool ends with the generator that
    owns it, or with the program. Errors of `make` come out where the result is asked for.
    """
    pool = ThreadPoolExecutor(1, "batches")
    pending: deque[Future[_T]] = deque(pool.submit(make, next(arguments)) for _ in range(count))
    while True:
        result = pending.popleft().result()
        pending.append(pool.submit(make, next(arguments)))
        yield result
