"""Weak scaling on paper: the same work a device on more of them, from one compiled program's messages."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ddpm_jax.planning.chips import Device, links
from ddpm_jax.planning.collectives import Collective, wire_bytes
from ddpm_jax.planning.roofline import Roofline


class Scale(NamedTuple):
    """A step on a slice of some size, whose batch grows with it."""

    chips: int
    shape: str  # of the slice: "4x8"
    collective_s: float
    hidden: float  # work a second over that of devices that send nothing, where computing hides the messages
    exposed: float  # the same where it hides none


def weak_scaling(
    device: Device,
    shape: Sequence[int],
    step: Roofline,
    collectives: Sequence[Collective],
    *,
    fsdp: int = 1,
    most: int = 256,
) -> list[Scale]:
    """The slice itself and those with twice, four times, … as many chips.

    What a device computes and moves stays, and so do the bytes of each collective's result; a ring of n devices sends
    2 (n - 1) / n of a gradient, and a slice has more links where more of its axes are closed. Groups of ``fsdp`` stay.

    Args:
        device: the peaks.
        shape: chips on each axis of the slice of the compiled program.
        step: of that program.
        collectives: of that program.
        fsdp: devices that share a state.
        most: chips, at most.
    """
    work = max(step.compute_s, step.memory_s)
    found: list[Scale] = []
    for doublings in itertools.count():
        grown = _grown(shape, doublings)
        if doublings and math.prod(grown) > most:
            return found
        larger = [x if x.group_size == fsdp > 1 else _over(x, 2**doublings) for x in collectives]
        num_links = links(device, list(itertools.product(*map(range, grown))))
        seconds = sum(map(wire_bytes, larger)) / (device.link_bandwidth * num_links) if num_links else 0.0
        name = "x".join(map(str, grown))
        found.append(Scale(math.prod(grown), name, seconds, work / max(work, seconds), work / (work + seconds)))
    raise AssertionError("the slices never end")


def _grown(shape: Sequence[int], doublings: int) -> list[int]:
    """A slice with its shortest axis doubled, time and again: 2x4, 4x4, 4x8, 8x8, …; an axis of one chip stays."""
    grown = list(shape)
    for _ in range(doublings):
        shortest = min(size for size in grown if size > 1) if max(grown) > 1 else 1
        grown[grown.index(shortest)] *= 2
    return sorted(grown)


def _over(collective: Collective, factor: int) -> Collective:
    return collective._replace(group_size=collective.group_size * factor)
