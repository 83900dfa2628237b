"""What XLA is told beside the program: options that change its speed and nothing else."""

import jax

# YNNPACK, to which XLA gives them by default, takes up to three times as long for wide 3x3 convolutions on a CPU as
# XLA's own code does, and up to four for the gradients of their weights; its matrix products and sums are the faster.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
# An option of experiments, unknown to XLA before and perhaps after; one that it does not know it refuses.
_MEASURED_WITH = ((0, 10), (0, 12))


def compiler_options(platform: str) -> dict[str, str]:
    """For ``jax.jit(compiler_options=…)`` of a program on "cpu", "gpu" or "tpu"; only a CPU is told anything."""
    return dict(_CPU) if platform == "cpu" and jax.__version_info__[:2] in _MEASURED_WITH else {}
