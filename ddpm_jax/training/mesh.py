"""Devices and who holds what: the mesh, the sharding of a batch, the sharding of the state."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Below this many elements an array is not worth cutting: gathering it costs more than holding it.
MIN_SHARDED_SIZE = 2**16


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("data", "fsdp") mesh of the first data * fsdp devices; data = -1 takes all there are, or all that are given.

    Raises:
        ValueError: the devices do not suffice, or fsdp does not divide them.
    """
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
    # Auto: with Explicit axes, the default, Linen's Dropout fails.
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices[: data * fsdp])


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
