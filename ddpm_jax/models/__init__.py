"""Flax Linen networks: ``model.apply({"params": params}, x_t, t, label, train=False)`` -> float32 [B H W C].

The only room that imports ``flax.linen``.
"""

from flax.linen import Module as Network

from ddpm_jax.models.linear_attention_unet import LinearAttentionUNet
from ddpm_jax.models.unet import ATTENTIONS, REMATS, UNet, check_attention

# model.kind -> module. Its fields are the settings of the config that it takes.
NETWORKS: dict[str, type[Network]] = {"unet": UNet, "linear_attention_unet": LinearAttentionUNet}

__all__ = ["ATTENTIONS", "NETWORKS", "REMATS", "LinearAttentionUNet", "Network", "UNet", "check_attention"]
