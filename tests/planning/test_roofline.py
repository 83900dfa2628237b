"""The least a step can take."""

from types import SimpleNamespace

import pytest

from ddpm_jax.planning import Collective, Cost, Device, cost_of, roofline, temp_bytes_wanted

DEVICE = Device(flops=100.0, hbm_bytes=1000, hbm_bandwidth=10.0, link_bandwidth=2.0, torus=4)


@pytest.mark.parametrize(
    ("flops", "traffic", "sent", "bound", "mfu"),
    [(400.0, 10.0, 0, "compute", 1.0), (100.0, 40.0, 0, "memory", 0.25), (100.0, 10.0, 20, "collective", 0.2)],
)
def test_the_longest_of_three_times(flops, traffic, sent, bound, mfu):
    # Two devices' all-reduce of 20 bytes sends 20; two links of 2 bytes a second take 5 seconds.
    found = roofline(DEVICE, Cost(flops, traffic, 0, 0), [Collective("all-reduce", 2, sent, 1)], 2)
    assert (found.compute_s, found.memory_s, found.collective_s) == (flops / 100, traffic / 10, sent / 4)
    assert found.bound == bound
    assert found.mfu_limit == pytest.approx(mfu)


def compiled(flops, traffic):
    memory = SimpleNamespace(
        argument_size_in_bytes=50, output_size_in_bytes=45, alias_size_in_bytes=40, temp_size_in_bytes=7
    )
    return SimpleNamespace(
        cost_analysis=lambda: {"flops": flops, "bytes accessed": traffic}, memory_analysis=lambda: memory
    )


def test_loops_are_put_right():
    # A step reads and writes a state of 20 bytes, and each of three micro-batches moves 100 and computes 10.
    assert cost_of(compiled(10.0, 40.0 + 100.0), state_bytes=20, accumulate=3) == Cost(30.0, 340.0, 50, 12)
    assert cost_of(compiled(10.0, 140.0), state_bytes=20) == Cost(10.0, 140.0, 50, 12)


def test_the_compilers_own_word_for_memory():
    # The first is what libtpu 0.0.42 says.
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (39.65G) "
    assert temp_bytes_wanted(message + "exceeds available HBM (15.75G).", 2**30) == int(39.65 * 2**30)
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    assert (
        temp_bytes_wanted(message + "Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.", 2**30) == 20.5 * 2**30
    )
    assert temp_bytes_wanted("INTERNAL: something else", 0) is None
