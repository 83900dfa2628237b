"""Flax Linen networks: ``model.apply({"params": params}, x_t, t, label, train=False)`` -> float32 [B H W C].

A network whose class says ``takes = "noise_level"`` wants 1 - alpha_bar, float32 [B], in place of t. The only room that
imports ``flax.linen``.
"""

from flax.linen import Module as Network

from ddpm_jax.models.layers import REMATS
from ddpm_jax.models.linear_attention_unet import LinearAttentionUNet
from ddpm_jax.models.residual_unet import ResidualUNet
from ddpm_jax.models.unet import ATTENTIONS, UNet, check_attention

# model.kind -> module. Its fields are the settings of the config that it takes.
NETWORKS: dict[str, type[Network]] = {
    "unet": UNet,
    "linear_attention_unet": LinearAttentionUNet,
    "residual_unet": ResidualUNet,
}


def network_class(kind: str, time: str) -> type[Network]:
    """The module of ``model.kind``.

    Raises:
        ValueError: there is none, or it is told whole timesteps where ``diffusion.time`` is "continuous".
    """
    if kind not in NETWORKS:
        raise ValueError(f"model.kind={kind!r}: choose one of {', '.join(NETWORKS)}")
    if time == "continuous" and not takes_noise_level(NETWORKS[kind]):
        others = ", ".join(name for name, network in NETWORKS.items() if takes_noise_level(network))
        raise ValueError(
            f"diffusion.time='continuous': the network {kind!r} is told the timestep, a whole number; use discrete, or "
            f"model.kind={others}"
        )
    return NETWORKS[kind]


def takes_noise_level(network: Network | type[Network]) -> bool:
    """Whether a network wants the noise level 1 - alpha_bar, float32 [B], where others want t."""
    return getattr(network, "takes", "t") == "noise_level"


__all__ = [
    "ATTENTIONS",
    "NETWORKS",
    "REMATS",
    "LinearAttentionUNet",
    "Network",
    "ResidualUNet",
    "UNet",
    "check_attention",
    "network_class",
    "takes_noise_level",
]
