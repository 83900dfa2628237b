import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax import training
from ddpm_jax.data import ImageSet, batches, index_batches
from ddpm_jax.data.placement import device_batches, gather, local_rows, put_images

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
LABELED = ImageSet(IMAGES, np.arange(100, 130, dtype=np.int32))
BARE = ImageSet(IMAGES[..., :1].copy(), None)
ORDER = {"seed": 3, "batch_size": 8, "random_flip": True}
MESH = training.make_mesh(1)


def to_devices(iterator, resident=None):
    return device_batches(iterator, training.batch_sharding(MESH), ORDER["batch_size"], resident)


@pytest.mark.parametrize("image_set", [LABELED, BARE], ids=["labelled", "bare"])
@pytest.mark.parametrize("flip", [False, True])
def test_what_the_device_gathers_is_what_the_host_serves(image_set, flip):
    order = ORDER | {"random_flip": flip}
    served = to_devices(batches(image_set, **order))
    resident = put_images(image_set, training.replicated(MESH))
    gathered = map(jax.jit(gather), to_devices(index_batches(len(image_set.images), **order), resident))
    for one, two in itertools.islice(zip(served, gathered, strict=False), 9):  # into the third epoch
        assert one.keys() == two.keys() == ({"image", "label"} if image_set is LABELED else {"image"})
        for name in one:
            assert (one[name].dtype, one[name].shape) == (two[name].dtype, two[name].shape)
            np.testing.assert_array_equal(one[name], two[name])


def test_the_set_is_uint8_and_whole_on_the_device():
    found = put_images(LABELED, training.replicated(MESH))
    assert found["images"].dtype == np.uint8
    np.testing.assert_array_equal(found["images"], IMAGES)
    np.testing.assert_array_equal(found["labels"], LABELED.labels)
    assert put_images(BARE, training.replicated(MESH)).keys() == {"images"}


def numbered(count, log):
    for i in range(count):
        log.append(i)
        yield {"image": np.full((8, 2), i, np.uint8)}


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_batch_comes_once_and_in_order(count):
    found = [int(batch["image"][0, 0]) for batch in to_devices(numbered(count, []))]
    assert found == list(range(count))


def test_one_batch_is_ahead_and_no_more():
    log = []
    iterator = to_devices(numbered(9, log))
    assert log == []
    for i in range(5):
        assert int(next(iterator)["image"][0, 0]) == i
        assert log == list(range(i + 2))


def test_a_batch_is_one_array_of_the_sharding_and_carries_what_is_resident():
    resident = {"images": jax.device_put(IMAGES)}
    (batch,) = to_devices(numbered(1, []), resident)
    assert batch["image"].sharding == training.batch_sharding(MESH)
    assert batch["images"] is resident["images"]


def test_what_is_on_the_device_does_not_change_when_the_next_batch_is_made():
    iterator = to_devices(batches(LABELED, **ORDER))
    held = list(itertools.islice(iterator, 6))
    again = batches(LABELED, **ORDER)
    for batch, expected in zip(held, again, strict=False):
        np.testing.assert_array_equal(batch["image"], expected["image"])


def test_an_error_of_the_source_arrives():
    def broken():
        yield {"image": np.zeros((8, 2), np.uint8)}
        raise OSError("torn")

    with pytest.raises(OSError, match="torn"):
        list(to_devices(broken()))


def test_one_process_holds_every_row():
    np.testing.assert_array_equal(local_rows(training.batch_sharding(MESH), 6), np.arange(6))


# Eight host devices, in a process of their own


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_the_rows_of_a_process_are_those_of_its_devices_in_any_order(permuted, fsdp):
    for name, found in permuted[str(fsdp)].items():
        assert sorted(found["rows"][0] + found["rows"][1]) == list(range(16)), name
        assert found["each_device_gets_its_rows"], name
        assert found["arrived"], name
    # The stand-in for two processes: with the devices in another order their shares are not halves.
    assert permuted[str(fsdp)]["in order"]["rows"] == [[*range(8)], [*range(8, 16)]]
    assert permuted[str(fsdp)]["alternating"]["rows"][0] == [0, 1, 4, 5, 8, 9, 12, 13]


@pytest.fixture(scope="module")
def permuted():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, Path(__file__).with_name("permuted_devices.py")]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
