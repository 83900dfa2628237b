"""Devices and who holds what: the mesh, the sharding of a batch, the sharding of the state."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Below this many elements an array is not worth cutting: gathering it costs more than holding it.
MIN_SHARDED_SIZE = 2**16


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("data", "fsdp") mesh of the first data * fsdp devices; data = -1 takes all there are, or all that are given.

    Several slices are joined along "data".

    Raises:
        ValueError: the devices do not suffice, fsdp does not divide them, or they would leave a process without one.
    """
    taken_from_all = devices is None
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or (data < 1 and data != -1):
        raise ValueError(f"mesh.data={data}, mesh.fsdp={fsdp}: must be positive; data = -1 is all the rest")
    if data == -1:
        if len(devices) % fsdp:
            raise ValueError(f"mesh.fsdp={fsdp}: does not divide the {len(devices)} devices")
        data = len(devices) // fsdp
    if data * fsdp > len(devices):
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}: need {data * fsdp} devices, and there are {len(devices)}"
        )
    chosen = list(devices[: data * fsdp])
    if taken_from_all and (idle := {x.process_index for x in devices} - {x.process_index for x in chosen}):
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}: leaves process {min(idle)} without a device; use all, data = -1"
        )
    axis_types = (AxisType.Auto,) * 2  # Explicit, the default, wants the sharding of every gradient
    if len({_slice_of(x) for x in chosen}) == 1:
        return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types, devices=chosen)
    return Mesh(across_slices(data, fsdp, chosen), ("data", "fsdp"), axis_types=axis_types)


def across_slices(data: int, fsdp: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of several slices, [data fsdp]: each row of "fsdp" lies within a slice where it can.

    Between slices is a slower network, and "data" sends a gradient a step, "fsdp" the parameters as well.

    Raises:
        ValueError: not the same number of devices of each slice.
    """
    sizes = collections.Counter(map(_slice_of, devices))
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}: takes {' and '.join(map(str, sizes.values()))} devices of "
            f"{len(sizes)} slices; use all, data = -1"
        )
    over_data = math.gcd(data, len(sizes))
    over_fsdp = len(sizes) // over_data
    return mesh_utils.create_hybrid_device_mesh((data // over_data, fsdp // over_fsdp), (over_data, over_fsdp), devices)


def _slice_of(device: jax.Device) -> int:
    """The TPU slice, or the machines of one NVLink domain, that a device is of; a CPU says nothing."""
    return getattr(device, "slice_index", 0)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are spread over all devices, along the first axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A sharding for each array of a state: its largest axis that fsdp divides is cut, small arrays are replicated."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _partition(x.shape, mesh.shape["fsdp"])), abstract_state)


def _partition(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not divisible or math.prod(shape) < MIN_SHARDED_SIZE:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(len(shape))))
