import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ddpm_jax import training
from ddpm_jax.models import UNet
from ddpm_jax.training.mesh import across_slices, state_shardings

ROOT = Path(__file__).parents[2]


def shardings(mesh, **shapes):
    return {
        name: tuple(sharding.spec)
        for name, sharding in state_shardings(
            mesh, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        ).items()
    }


def abstract_mesh(data, fsdp):
    return AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_large_arrays_are_cut_along_the_largest_axis_that_fsdp_divides():
    found = shardings(
        abstract_mesh(2, 4),
        kernel=(3, 3, 128, 256),
        square=(3, 3, 256, 256),
        odd=(1023, 512),
        indivisible=(1023, 513),
        limit=(2**16,),
        small=(2**16 - 4,),
        scalar=(),
    )
    assert found == {
        "kernel": (None, None, None, "fsdp"),
        "square": (None, None, "fsdp", None),
        "odd": (None, "fsdp"),
        "indivisible": (),
        "limit": ("fsdp",),
        "small": (),
        "scalar": (),
    }


def test_without_fsdp_the_state_is_replicated():
    assert shardings(abstract_mesh(8, 1), kernel=(3, 3, 256, 256)) == {"kernel": ()}


def test_the_cifar10_network_in_four_parts_is_a_quarter_on_each():
    x_t, t = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(UNet(out_channels=3).init, jax.random.key(0), x_t, t)
    cut = state_shardings(abstract_mesh(1, 4), params)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(cut), strict=True))
    share = sum(math.prod(sharding.shard_shape(x.shape)) for x, sharding in pairs)
    assert 0.25 < share / 35_746_307 < 0.27


def test_the_mesh_of_one_device():
    mesh = training.make_mesh(1, 1)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert training.batch_sharding(mesh) == NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    assert training.replicated(mesh).is_fully_replicated


# Several slices


@dataclasses.dataclass(frozen=True)
class Device:
    """What the arrangement asks of a device that is not there."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def slices_of_rows(sizes, data, fsdp):
    """The slices in each row of "fsdp", of slices of these sizes."""
    devices = [Device(100 * i + j, i) for i, size in enumerate(sizes) for j in range(size)]
    return [[device.slice_index for device in row] for row in across_slices(data, fsdp, devices)]


def test_fsdp_stays_within_a_slice():
    assert slices_of_rows([4, 4], 4, 2) == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert slices_of_rows([4, 4], 2, 4) == [[0] * 4, [1] * 4]
    assert slices_of_rows([4] * 4, 8, 2) == [[i // 2] * 2 for i in range(8)]


def test_fsdp_spans_slices_only_where_it_must():
    assert slices_of_rows([4, 4], 1, 8) == [[0] * 4 + [1] * 4]
    assert slices_of_rows([2] * 4, 2, 4) == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_part_of_a_slice_is_refused():
    with pytest.raises(ValueError, match=r"mesh.data=3, mesh.fsdp=2: takes 4 and 2 devices of 2 slices; .*data = -1"):
        slices_of_rows([4, 2], 3, 2)


_TWO_SLICES = """
import json, os, sys
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
from jax.experimental import topologies
from ddpm_jax import training
devices = topologies.get_topology_desc("v5e:2x4", "tpu", num_slices=2).devices
found = {}
for fsdp in (1, 4, 8):
    mesh = training.make_mesh(-1, fsdp, list(devices))
    found[fsdp] = [[device.slice_index for device in row] for row in mesh.devices]
json.dump(found, sys.stdout)
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_two_tpu_slices():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _TWO_SLICES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["1"] == [[i // 8] for i in range(16)]  # 2x4 is the shape of each slice
    assert found["4"] == [[0] * 4] * 2 + [[1] * 4] * 2
    assert found["8"] == [[0] * 8, [1] * 8]


# Eight host devices, in a process of their own


@pytest.fixture(scope="module")
def eight():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, Path(__file__).with_name("eight_devices.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8", "2x4", "4x2", "8 in 4", "4x2 in 4"])
def test_many_devices_compute_what_one_does(eight, mesh):
    one, many = eight["runs"]["1"], eight["runs"][mesh]
    assert many["devices"] == 8
    assert many["counts"] == one["counts"]  # the same timesteps, so the same draws
    np.testing.assert_allclose(many["params_sum"], one["params_sum"], rtol=1e-6)
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(many["norms"], one["norms"], rtol=1e-3)
    assert len(set(one["losses"])) == 3


@pytest.mark.slow
def test_each_device_holds_its_share_and_nothing_more(eight):
    runs = eight["runs"]
    assert all(run["as_described"] and run["stays"] and run["compiled"] == 1 for run in runs.values())
    assert runs["8"]["bytes_a_device"] == runs["8"]["bytes"] == runs["1"]["bytes"]
    assert 0.25 <= runs["2x4"]["bytes_a_device"] / runs["2x4"]["bytes"] < 0.3
    assert 0.5 <= runs["4x2"]["bytes_a_device"] / runs["4x2"]["bytes"] < 0.55
    assert runs["8"]["whole_and_large"] > 0
    assert runs["2x4"]["whole_and_large"] <= 0.05 * runs["8"]["whole_and_large"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8", "4x2", "8 in 4", "4x2 in 4"])
def test_gradients_are_reduced_once_a_step_and_never_inside_a_loop(eight, mesh):
    run = eight["runs"][mesh]
    sent, cut = run["sent"], run["cut_gradients"]
    assert sent["in_loops"] == 0
    assert (cut > 0) == mesh.startswith("4x2")
    if mesh == "4x2 in 4":
        assert sent["reduce-scatter"] == cut / 2
    # What fsdp = 2 cuts is reduced over two devices, and then a half of it over four. The loss and its sums are small,
    # and the norm of a gradient that is cut is a number an array.
    small = 200 + 4 * run["cut_arrays"]
    # An UpsampleConv multiplies by 16 sums of its 9 weights: jit reduces the gradient of those, shard_map of these.
    gradients = run["gradients"] + (run["unfolded"] if " in " not in mesh else 0)
    assert 0 <= sent["all-reduce"] + 2 * sent["reduce-scatter"] - gradients <= cut / 2 + small


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_restored_on_another(eight):
    moved = eight["runs"]["2x4"]["moved"]
    assert moved["cut"] > 20
    assert moved["same_bits"]
    assert moved["on_the_new_mesh"]


@pytest.mark.slow
def test_meshes_that_cannot_be(eight):
    assert eight["all"] == {"-1,1": {"data": 8, "fsdp": 1}, "-1,4": {"data": 2, "fsdp": 4}}
    assert eight["refusals"] == {
        "9,1": "mesh.data=9, mesh.fsdp=1: need 9 devices, and there are 8",
        "4,4": "mesh.data=4, mesh.fsdp=4: need 16 devices, and there are 8",
        "-1,3": "mesh.fsdp=3: does not divide the 8 devices",
        "0,1": "mesh.data=0, mesh.fsdp=1: must be positive; data = -1 is all the rest",
    }
