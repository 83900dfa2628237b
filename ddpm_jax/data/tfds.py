"""Images from TensorFlow Datasets, `tfds:<name>`."""

import difflib
import functools
import itertools
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np

from ddpm_jax.data.decoding import collect, fit, import_tensorflow
from ddpm_jax.data.image_set import DataError, ImageSet

# An offline run must say so within 30 seconds, the import of TensorFlow included.
_BUILDER_SECONDS = 12.0
_NETWORK_SECONDS = 8.0
_HOST_SECONDS = 3.0

_READ_BYTES = 8 * 2**20  # asked of a file at once, which may lie far away
_RECORDS = 32  # handed over at once

_REMEDY = (
    "prepare it once on a machine with a network (tfds build <name>), copy it here and point data.data_dir at the "
    "folder that holds it"
)

_T = TypeVar("_T")
Example = tuple[bytes, int | None]  # an encoded image and its label


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """Hold back TFDS's warnings, of folders that are not there and of its own deprecations, around our one line."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@_quiet_absl()
def load_tfds(source: str, name: str, split: str, data_dir: str | None, image_size: int, channels: int) -> ImageSet:
    """Read the fields `image` and, where it is an integer, `label`, of a data set that is prepared or downloadable."""
    builder = _prepared(source, name, data_dir)
    total = _count(source, split, builder)
    arrays = _decode(source, builder, split, total, image_size, channels)
    labels = arrays.get("label")
    return ImageSet(arrays["image"], None if labels is None else labels.astype(np.int32))


class RecordFiles(NamedTuple):
    """The TFRecord files of a split, in the order in which `load_tfds` reads them.

    sizes: images of the split in each, none of them 0.
    read: (files int [n], images to skip) -> the examples of those files, in order.
    decode: a tensor of an encoded image -> a tensor uint8 [S S C], inside tf.data.
    has_labels: whether there is one integer label an image.
    damaged: says what to do with a set that cannot be read.
    """

    sizes: tuple[int, ...]
    read: Callable[[np.ndarray, int], Iterator[Example]]
    decode: Callable[[Any], Any]
    has_labels: bool
    damaged: str


@_quiet_absl()
def open_tfds(source: str, name: str, split: str, data_dir: str | None, image_size: int, channels: int) -> RecordFiles:
    """Find the files of what `load_tfds` would read, and read no image yet."""
    import tensorflow_datasets as tfds

    builder = _prepared(source, name, data_dir)
    _count(source, split, builder)
    files = [file for file in builder.info.splits[split].file_instructions if file.take]
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(
            f"data.source={source!r} is stored as {builder.info.file_format.value}: only TFRecord files are streamed; "
            "use data.placement='host'"
        )
    fields = _fields(builder)
    partial = tfds.decode.PartialDecoding(fields, decoders={"image": tfds.decode.SkipDecoding()})
    features = partial.extract_features(builder.info.features)
    # Traced here, once, and not in every epoch and every chunk of a stream.
    signature = [import_tensorflow().TensorSpec((), "string")]
    trace = functools.partial(import_tensorflow().function, input_signature=signature)
    return RecordFiles(
        sizes=tuple(file.take for file in files),
        read=functools.partial(
            _read_records,
            files,
            trace(lambda record: features.deserialize_example(record, decoders=partial.decoders)),
            _damaged(source, builder),
        ),
        decode=trace(lambda encoded: fit(features["image"].decode_example(encoded), image_size, channels)),
        has_labels="label" in fields,
        damaged=_damaged(source, builder),
    )


def _read_records(
    files: list[Any], parse: Callable[[Any], Any], damaged: str, numbers: np.ndarray, skip: int
) -> Iterator[Example]:
    """The encoded images and labels of some files, one file after the other."""
    tf = import_tensorflow()
    parts = []
    for file in (files[number] for number in numbers):
        skipped = min(skip, file.take)
        skip -= skipped
        if skipped < file.take:
            parts.append((str(file.filename), file.skip + skipped, file.take - skipped))
    names, skips, takes = (list(column) for column in zip(*parts, strict=True))
    dataset = tf.data.Dataset.from_tensor_slices((names, np.array(skips, np.int64), np.array(takes, np.int64)))
    dataset = dataset.flat_map(
        lambda name, skip, take: tf.data.TFRecordDataset(name, buffer_size=_READ_BYTES).skip(skip).take(take)
    )
    dataset = dataset.map(parse)
    done, failure = 0, tf.errors.OpError  # looked up now: a program may end while this waits, its modules already empty
    try:
        for batch in dataset.batch(_RECORDS).prefetch(1).as_numpy_iterator():
            done += len(batch["image"])
            yield from zip(batch["image"], batch.get("label", itertools.repeat(None)), strict=False)
    except failure as error:
        raise DataError(f"{damaged} ({_in_one_line(error)})") from error
    if done != sum(takes):
        raise DataError(f"{damaged} ({done} images instead of {sum(takes)})")


def _prepared(source: str, name: str, data_dir: str | None) -> Any:
    """Return the builder of a set of images that lies on disk, now at the latest."""
    import_tensorflow()  # before TFDS does it in its own way
    builder = _find(source, name, data_dir)
    _check_image(source, builder)
    if not builder.is_prepared():
        _prepare(source, data_dir, builder)
    return builder


def _find(source: str, name: str, data_dir: str | None) -> Any:
    """Return TFDS's builder of the data set, which reads its description and none of its images."""
    import tensorflow_datasets as tfds

    folder = data_dir and os.path.expanduser(data_dir)
    try:
        # Some releases ask Google's storage for the description, and retry for minutes.
        return _within(_BUILDER_SECONDS, lambda: tfds.builder(name, data_dir=folder))
    except tfds.core.DatasetNotFoundError:
        raise DataError(f"data.source={source!r}: TFDS knows no such data set; {_suggestion(name)}") from None
    except TimeoutError:
        raise DataError(
            f"data.source={source!r} is not prepared in data.data_dir={data_dir!r} and TFDS finds no network: {_REMEDY}"
        ) from None
    except Exception as error:  # whatever the code of one of its many data sets raises
        raise DataError(f"data.source={source!r}: TFDS cannot open it: {_in_one_line(error)}") from error


def _suggestion(name: str) -> str:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr('tfds:' + match) for match in near)}?"
    return "see www.tensorflow.org/datasets/catalog, or point data.data_dir at the folder that holds it"


def _check_image(source: str, builder: Any) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    fields = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}  # else a sequence
    if not isinstance(fields.get("image"), tfds.features.Image):
        found = ", ".join(fields) or type(features).__name__
        raise DataError(f"data.source={source!r} has no field 'image' (it has {found}): choose a set of images")
    if fields["image"].np_dtype != np.uint8:
        raise DataError(
            f"data.source={source!r} has images of {fields['image'].np_dtype}: choose a set of uint8 images"
        )


def _prepare(source: str, data_dir: str | None, builder: Any) -> None:
    """Download and prepare a data set, after a look whether its hosts answer: TFDS itself retries for minutes."""
    import tensorflow_datasets as tfds

    missing = f"data.source={source!r} is not prepared in data.data_dir={data_dir!r} ({builder.data_dir})"
    hosts = _hosts(builder)
    if hosts and not _any_answers(hosts):
        raise DataError(f"{missing} and {' or '.join(hosts)} cannot be reached: {_REMEDY}")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:  # one line for the user, the cause for the curious
        raise DataError(f"{missing} and TFDS cannot prepare it: {_in_one_line(error)}; or {_REMEDY}") from error


def _hosts(builder: Any) -> list[str]:
    """List at most three of the hosts that the data set is downloaded from, none if the user downloads it by hand."""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return []
    urls = builder.url_infos or ["https://storage.googleapis.com"]
    return list(dict.fromkeys(f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" for url in urls))[:3]


def _any_answers(hosts: Iterable[str]) -> bool:
    try:
        # The look-up of a name has no time limit of its own.
        return _within(_NETWORK_SECONDS, lambda: any(map(_answers, hosts)))
    except TimeoutError:
        return False


def _answers(host: str) -> bool:
    """Tell whether a host answers at all; urllib goes through the same proxies as TFDS."""
    try:
        urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=_HOST_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code < 500  # a missing page is an answer, a gateway's error is none
    except (OSError, ValueError):
        return False
    return True


def _count(source: str, split: str, builder: Any) -> int:
    splits = builder.info.splits
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError) as error:
        known = ", ".join(repr(name) for name in splits)
        raise DataError(
            f"data.split={split!r} is no split of {source!r}: it has {known}, and sums and slices of them, "
            "such as 'train+test' or 'train[:10%]'"
        ) from error
    if count < 1:
        raise DataError(f"data.split={split!r} of {source!r} holds no image: choose a larger part")
    return count


def _decode(source: str, builder: Any, split: str, total: int, image_size: int, channels: int) -> dict[str, np.ndarray]:
    """Decode a split in the order of its files: image uint8 [N S S C], and label [N] if it is one integer an image."""
    import tensorflow_datasets as tfds

    tf = import_tensorflow()
    dataset = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders=tfds.decode.PartialDecoding(_fields(builder)),
        # One file after the other: the order must not hang on how many files TFDS interleaves by default.
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    dataset = dataset.map(
        lambda example: {**example, "image": fit(example["image"], image_size, channels)},
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    try:
        arrays = collect(dataset, total)
    except tf.errors.OpError as error:
        raise DataError(f"{_damaged(source, builder)} ({_in_one_line(error)})") from error
    if len(arrays["image"]) != total:
        raise DataError(f"{_damaged(source, builder)} ({len(arrays['image'])} images instead of {total})")
    return arrays


def _fields(builder: Any) -> dict[str, bool]:
    """Name what is read of an example: the image, and its label if that is one integer."""
    label = dict(builder.info.features.items()).get("label")
    labelled = label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)
    return {"image": True} | ({"label": True} if labelled else {})


def _damaged(source: str, builder: Any) -> str:
    return f"data.source={source!r} is damaged: remove {builder.data_dir} and prepare it again"


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return `call()`, or raise TimeoutError and leave it behind in a thread that does not keep the program alive."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=seconds)


def _in_one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
