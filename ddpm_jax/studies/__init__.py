"""What DDIM does, shown: each function draws pictures from a run and measures what they say.

A study takes a run (``experiment.load``), or less, and returns a ``Study``: pictures in labelled rows and columns, and
numbers. ``explore`` writes it to files, a notebook looks at it with ``figures.sheet``. The run's own ``sampling.*``
holds wherever a study does not say otherwise.
"""

from ddpm_jax.studies.equivalence import disagreement, equivalence, variances
from ddpm_jax.studies.latents import interpolate, mix, reconstruct
from ddpm_jax.studies.sampling import chain, determinism, eta_by_steps, few_steps, forward
from ddpm_jax.studies.schedules import Curves, schedule_curves, schedule_numbers
from ddpm_jax.studies.study import Start, Study, decode, drawn_start, encode, given_start, with_sampling

__all__ = [
    "Curves",
    "Start",
    "Study",
    "chain",
    "decode",
    "determinism",
    "disagreement",
    "drawn_start",
    "encode",
    "equivalence",
    "eta_by_steps",
    "few_steps",
    "forward",
    "given_start",
    "interpolate",
    "mix",
    "reconstruct",
    "schedule_curves",
    "schedule_numbers",
    "variances",
    "with_sampling",
]
