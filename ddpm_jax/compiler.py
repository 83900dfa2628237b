"""What XLA is told beside the program: what changes its speed and nothing else."""

import contextlib
import os

import jax

# YNNPACK, to which XLA gives them by default, takes up to three times as long for wide 3x3 convolutions on a CPU as
# XLA's own code does, and up to four for the gradients of their weights; its matrix products and sums are the faster.
# Products alone: with what is added to them it would take the convolution beside a shortcut too.
# The pass removes optimization barriers before XLA fuses loops, so that they would be in vain (models/layers.py).
# Cores that are devices wait for each other, and by default XLA ends a process in which one of them is 40 s late.
_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_collective_call_terminate_timeout_seconds": "600",
}
# An option of experiments, unknown to XLA before and perhaps after; one that it does not know it refuses.
_MEASURED_WITH = ((0, 10), (0, 12))
# Each device that is a core holds a copy of the state.
_MOST_CORES = 8


def compiler_options(platform: str) -> dict[str, str]:
    """For ``jax.jit(compiler_options=…)`` of a program on "cpu", "gpu" or "tpu"; only a CPU is told anything."""
    return dict(_CPU) if platform == "cpu" and jax.__version_info__[:2] in _MEASURED_WITH else {}


def use_cores(num_images: int, *, even: bool = False) -> None:
    """Makes cores of a CPU devices, at most 8, and no more than there are images; before JAX touches a device.

    XLA spreads a convolution over all cores and runs most of what lies between convolutions on one; with a part of the
    batch on each core all of it is spread. Nothing changes on accelerators, for a process that has peers, where the
    user says how many devices a CPU is (``JAX_NUM_CPU_DEVICES``, ``XLA_FLAGS``), and where they are there already.

    Args:
        num_images: in a batch.
        even: as many devices as divide it; otherwise the last one may compute a few images for nothing.
    """
    said = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or jax.config.values["jax_num_cpu_devices"] >= 0 or jax.distributed.is_initialized():
        return
    most = min(num_cores(), _MOST_CORES, num_images)
    number = next(n for n in range(most, 0, -1) if not even or num_images % n == 0)
    with contextlib.suppress(RuntimeError):  # the devices are there already
        jax.config.update("jax_num_cpu_devices", number)


def num_cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
