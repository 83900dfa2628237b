"""What TPU chips can do, by their makers' numbers."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

GIB = 2**30


class Device(NamedTuple):
    """The peaks of one JAX device: a chip, or one of its two cores where these are devices of their own."""

    flops: float  # bfloat16, a second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second, one direction of one link between chips
    torus: int  # an axis whose number of chips this divides is closed to a ring
    cores: int = 1  # devices that share a chip, its memory and its links


# Of a whole chip. What Google calls bidirectional bandwidth a chip is that of all its links in both directions.
CHIPS = {
    # https://cloud.google.com/tpu/docs/v3: 123 TFLOP/s, 32 GiB, 900 GB/s; 1,024 chips are a 32x32 torus. Links: 4 of
    # 656 Gbit/s, Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural networks".
    "v3": Device(123e12, 32 * GIB, 900e9, 656e9 / 8, 32, 2),
    # https://cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1,200 GB/s; rings where an axis is a multiple of 4.
    # Links: 6 of 50 GB/s, Jouppi et al. 2023, arXiv:2304.01433, table 4; it also has the memory's 1,200 GB/s.
    "v4": Device(275e12, 32 * GIB, 1200e9, 50e9, 4, 2),
    # https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s; 400 GB/s bidirectional over 4 links; 16x16.
    "v5e": Device(197e12, 16 * GIB, 819e9, 50e9, 16),
    # https://cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2,765 GB/s; 1,200 GB/s bidirectional over 6 links.
    "v5p": Device(459e12, 95 * GIB, 2765e9, 100e9, 4),
    # https://cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1,638 GB/s; 800 GB/s bidirectional over 4 links; 16x16.
    "v6e": Device(918e12, 32 * GIB, 1638e9, 100e9, 16),
}


def device_of(chip: str) -> Device:
    """The peaks of one JAX device of a chip; the two cores of a v3 or v4 have half of it each.

    Raises:
        ValueError: no such chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"{chip}: choose one of {', '.join(CHIPS)}")
    whole = CHIPS[chip]
    return whole._replace(
        flops=whole.flops / whole.cores,
        hbm_bytes=whole.hbm_bytes // whole.cores,
        hbm_bandwidth=whole.hbm_bandwidth / whole.cores,
        link_bandwidth=whole.link_bandwidth / whole.cores,
    )


def links(device: Device, coordinates: Iterable[Sequence[int]]) -> int:
    """How many links each chip of a slice can send on at once, its corners included.

    Two an axis where the axis is closed to a ring, one where it is open, none where it has one chip.

    Args:
        device: of the slice.
        coordinates: of its chips, [x y z] each.
    """
    sizes = [len(set(axis)) for axis in zip(*coordinates, strict=True)]
    assert math.prod(sizes) > 0
    return sum(2 if size % device.torus == 0 else 1 for size in sizes if size > 1)
