"""Flax Linen networks: ``model.apply({"params": params}, x_t, t, label, train=False)`` -> float32 [B H W C].

The only room that imports ``flax.linen``.
"""

from ddpm_jax.models.unet import ATTENTIONS, REMATS, UNet, check_attention

NETWORKS = {"unet": UNet}  # model.kind -> module

__all__ = ["ATTENTIONS", "NETWORKS", "REMATS", "UNet", "check_attention"]
