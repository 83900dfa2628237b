"""What chips can do."""

import pytest

from ddpm_jax import planning


def test_two_cores_share_a_chip():
    for chip in ("v3", "v4"):
        whole, core = planning.CHIPS[chip], planning.device_of(chip)
        for name in ("flops", "hbm_bytes", "hbm_bandwidth", "link_bandwidth"):
            assert 2 * getattr(core, name) == getattr(whole, name)
    assert planning.device_of("v5e") == planning.CHIPS["v5e"]
    with pytest.raises(ValueError, match="v2: choose one of v3, v4, v5e, v5p, v6e"):
        planning.device_of("v2")


@pytest.mark.parametrize(
    ("chip", "bidirectional", "per_chip"),
    [("v4", 600e9, 6), ("v5e", 400e9, 4), ("v5p", 1200e9, 6), ("v6e", 800e9, 4)],
)
def test_links_add_up_to_what_google_states_for_a_chip(chip, bidirectional, per_chip):
    # On a full torus every axis has two links.
    full = planning.CHIPS[chip].torus
    axes = per_chip // 2
    whole = [
        (i if axis == 0 else 0, i if axis == 1 else 0, i if axis == 2 else 0)
        for axis in range(axes)
        for i in range(full)
    ]
    number = planning.links(planning.CHIPS[chip], whole)
    assert number == per_chip
    assert 2 * number * planning.CHIPS[chip].link_bandwidth == bidirectional


@pytest.mark.parametrize(
    ("chip", "shape", "number"),
    [
        ("v5e", (2, 4), 2),
        ("v5e", (8, 16), 3),
        ("v5e", (16, 16), 4),
        ("v5p", (2, 2, 1), 2),
        ("v5p", (4, 4, 4), 6),
        ("v3", (1, 1), 0),
    ],
)
def test_links_of_a_slice(chip, shape, number):
    x, y, z = (*shape, 1)[:3]
    chips = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
    assert planning.links(planning.device_of(chip), chips) == number
