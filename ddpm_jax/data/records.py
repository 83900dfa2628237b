"""A stream from the record files of TFDS: windows of them, read ahead."""

import itertools
import threading
from collections.abc import Callable, Generator, Iterator

import numpy as np

from ddpm_jax.data.image_set import DataError, Encoded, Stream
from ddpm_jax.data.order import stream_epoch, stream_indices
from ddpm_jax.data.pipeline import ahead
from ddpm_jax.data.tfds import Example, open_tfds
from ddpm_jax.progress import progress


def open_records(
    source: str, name: str, split: str, data_dir: str | None, image_shape: tuple[int, int, int], window: int
) -> Stream:
    """Streams a split of TFDS, whose files are read from end to end while no more than two windows lie in memory."""
    files = open_tfds(source, name, split, data_dir, image_shape[0], image_shape[2])
    sizes, starts = files.sizes, np.concatenate([[0], np.cumsum(files.sizes)])

    def order(seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        return stream_indices(seed, step, batch_size, sizes, window)

    def encoded(examples: list[Example], indices: np.ndarray) -> Encoded:
        images, labels = zip(*examples, strict=True)
        return Encoded(list(images), np.array(labels, np.int32) if files.has_labels else None, indices)

    def pick(indices: np.ndarray) -> Encoded:
        found: dict[int, Example] = {}
        with progress(len(set(indices.tolist())), "reading images", "img") as bar:
            for file in np.unique(np.searchsorted(starts, indices, side="right") - 1):
                wanted = set(indices[(indices >= starts[file]) & (indices < starts[file + 1])].tolist())
                line = range(min(wanted), max(wanted) + 1)
                examples = files.read(np.array([file]), line.start - int(starts[file]))
                found |= {i: x for i, x in zip(line, examples, strict=False) if i in wanted}
                bar.update(len(wanted))
        return encoded([found[i] for i in indices.tolist()], indices)

    def follow(
        seed: int, batch_size: int, rows: np.ndarray, first_step: int, closed: threading.Event
    ) -> Callable[[int], Encoded]:
        def read(numbers: np.ndarray, skip: int) -> Iterator[Example]:
            for example in files.read(numbers, skip):
                if closed.is_set():
                    raise RuntimeError("the stream was closed")  # in its own thread, where nobody hears it
                yield example

        windows = _windows(read, sizes, window, seed, batch_size, rows, first_step * batch_size)
        read_ahead = ahead(lambda _: next(windows), itertools.count(), 1)
        held: dict[int, Example] = {}

        def encoded_of(step: int) -> Encoded:
            positions = (step * batch_size + rows).tolist()
            while positions[-1] not in held:
                held.update(next(read_ahead))
            return encoded([held.pop(p) for p in positions], order(seed, step, batch_size)[0][rows])

        return encoded_of

    def stand_in(index: int) -> tuple[np.ndarray, int]:
        raise DataError(f"{files.damaged} (its image {index} cannot be decoded)")

    return Stream(
        source=source,
        num_images=sum(sizes),
        image_shape=image_shape,
        has_labels=files.has_labels,
        labels=None,
        order=order,
        pick=pick,
        follow=follow,
        decode=files.decode,
        stand_in=stand_in,
    )


def _windows(
    read: Callable[[np.ndarray, int], Iterator[Example]],
    sizes: tuple[int, ...],
    window: int,
    seed: int,
    batch_size: int,
    rows: np.ndarray,
    first: int,
) -> Generator[dict[int, Example], None, None]:
    """Read the files of epoch after epoch: of each window, what stands in `rows` at position `first` or later.

    Yields:
        {position: (encoded image, label)}.
    """
    total, is_mine = sum(sizes), np.isin(np.arange(batch_size), rows)
    for epoch in itertools.count(first // total):
        plan = stream_epoch(seed, epoch, sizes, window)
        begin = max(first - epoch * total, 0) // window * window
        records = read(plan.files, begin)
        for start in range(begin, total, window):
            here = slice(start, start + window)
            positions = epoch * total + np.arange(start, min(start + window, total))
            kept = is_mine[positions % batch_size] & (positions >= first)
            position_of = dict(zip(plan.order[here][kept].tolist(), positions[kept].tolist(), strict=True))
            line = plan.line[here].tolist()
            yield {position_of[i]: x for i, x in zip(line, records, strict=False) if i in position_of}
