"""Weak scaling: what grows with the slice, and what stays."""

import pytest

from ddpm_jax.planning import Collective, Device, Roofline, weak_scaling

DEVICE = Device(flops=1.0, hbm_bytes=1, hbm_bandwidth=1.0, link_bandwidth=2.0, torus=8)
STEP = Roofline(compute_s=3.0, memory_s=4.0, collective_s=0.0, bound="memory", mfu_limit=0.75)
GRADIENT = Collective("all-reduce", 8, 16, 1)


def test_slices_double_their_shortest_axis():
    assert [x.shape for x in weak_scaling(DEVICE, (2, 4), STEP, [], most=64)] == ["2x4", "4x4", "4x8", "8x8"]
    assert [x.shape for x in weak_scaling(DEVICE, (2, 2, 2), STEP, [], most=32)] == ["2x2x2", "2x2x4", "2x4x4"]
    assert [x.chips for x in weak_scaling(DEVICE, (2, 4, 1), STEP, [], most=16)] == [8, 16]
    assert [x.chips for x in weak_scaling(DEVICE, (1, 1, 1), STEP, [], most=2)] == [1, 2]
    assert [x.chips for x in weak_scaling(DEVICE, (4, 4), STEP, [], most=8)] == [16]  # itself always


def test_a_ring_of_n_sends_two_n_minus_one_over_n_on_the_links_of_its_slice():
    found = weak_scaling(DEVICE, (2, 4), STEP, [GRADIENT], most=64)
    # 16 bytes; 2x4, 4x4: one link of 2 bytes a second an axis. 4x8: the axis of eight is closed, three links; 8x8 four.
    expected = [16 * 2 * 7 / 8 / 4, 16 * 2 * 15 / 16 / 4, 16 * 2 * 31 / 32 / 6, 16 * 2 * 63 / 64 / 8]
    assert [x.collective_s for x in found] == pytest.approx(expected)
    assert found[0].exposed == pytest.approx(4 / (4 + 7))
    assert found[0].hidden == pytest.approx(4 / 7)
    assert found[-1].hidden == 1.0  # 3.9 s of messages behind 4 s of memory traffic


def test_groups_of_fsdp_stay():
    gather = Collective("all-gather", 4, 16, 1)
    found = weak_scaling(DEVICE, (2, 4), STEP, [gather], fsdp=4, most=16)
    assert found[0].collective_s == found[1].collective_s == 16 * 3 / 4 / 4
    assert weak_scaling(DEVICE, (2, 4), STEP, [gather], most=16)[1].collective_s == 16 * 7 / 8 / 4
