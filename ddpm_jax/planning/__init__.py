"""What a compiled program costs on a TPU: its numbers, its collectives, and the roofline they meet."""

from ddpm_jax.planning.chips import CHIPS, Device, device_of, links
from ddpm_jax.planning.collectives import Collective, collectives_of, wire_bytes
from ddpm_jax.planning.roofline import Cost, Roofline, cost_of, roofline, temp_bytes_wanted
from ddpm_jax.planning.scaling import Scale, weak_scaling

__all__ = [
    "CHIPS",
    "Collective",
    "Cost",
    "Device",
    "Roofline",
    "Scale",
    "collectives_of",
    "cost_of",
    "device_of",
    "links",
    "roofline",
    "temp_bytes_wanted",
    "weak_scaling",
    "wire_bytes",
]
