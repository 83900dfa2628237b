"""How long a step takes at least, and what keeps it from being shorter."""

import re
from typing import Any, NamedTuple

from ddpm_jax.planning.chips import Device
from ddpm_jax.planning.collectives import Collective, wire_bytes


class Cost(NamedTuple):
    """What one step costs each device."""

    flops: float
    bytes: float  # that instructions read and write: an upper bound of the memory's traffic
    argument_bytes: int
    temp_bytes: int


class Roofline(NamedTuple):
    """Seconds a step would take if one thing alone limited it."""

    compute_s: float
    memory_s: float
    collective_s: float
    bound: str  # which of the three is the longest: compute, memory or collective
    mfu_limit: float  # compute_s over the longest


def cost_of(compiled: Any, state_bytes: int = 0, accumulate: int = 1) -> Cost:
    """The compiler's own numbers, with its count of loops put right.

    XLA counts the body of a loop once. With micro-batches all arithmetic is in a loop's body, and all traffic but one
    reading and one writing of the state.

    Args:
        compiled: a ``jax.stages.Compiled``.
        state_bytes: of the state on one device.
        accumulate: micro-batches a step.
    """
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    traffic, outside = analysis["bytes accessed"], 2 * state_bytes if accumulate > 1 else 0
    return Cost(
        flops=analysis["flops"] * accumulate,
        bytes=outside + (traffic - outside) * accumulate,
        argument_bytes=memory.argument_size_in_bytes,
        # What is returned and does not take the place of an argument lies beside the temporaries.
        temp_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )


def temp_bytes_wanted(message: str, argument_bytes: int) -> int | None:
    """How much memory a program wants beside its arguments, from the compiler's error; None if that is not its error.

    libtpu says it in two ways: "HLO temporaries (39.65G) exceeds available HBM (15.75G)", and, where the sum is at
    fault, "Used 21.50G of 15.75G hbm".
    """
    if found := re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM", message):
        return _number(*found.groups())
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return _number(*found.groups()) - argument_bytes
    return None


def _number(digits: str, unit: str) -> int:
    return int(float(digits) * 1024 ** " KMGT".index(unit or " "))


def roofline(device: Device, cost: Cost, collectives: list[Collective], num_links: int) -> Roofline:
    """Williams et al. 2009: the time of a step is at least that of its arithmetic, its traffic, its messages.

    Args:
        device: the peaks.
        cost: of a step on one device.
        collectives: of a step.
        num_links: on which a chip sends at once.
    """
    compute = cost.flops / device.flops
    memory = cost.bytes / device.hbm_bandwidth
    messages = sum(map(wire_bytes, collectives)) / (device.link_bandwidth * num_links) if num_links else 0.0
    longest, bound = max((compute, "compute"), (memory, "memory"), (messages, "collective"))
    return Roofline(compute, memory, messages, bound, compute / longest if longest else 0.0)
