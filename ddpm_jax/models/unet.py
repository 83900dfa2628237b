"""The U-Net of Ho et al. 2020 (appendix B): residual blocks, attention, skips, time and class embedding."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.convolution import conv_for_training

NORM_EPSILON = 1e-6
REMATS = ("none", "blocks", "dots")
ATTENTIONS = ("xla", "cudnn")

# Glorot uniform, as Ho et al.; what ends a residual branch starts at zero, so that the network starts as a short one.
default_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zero_init = nn.initializers.zeros_init()


class UNet(nn.Module):
    """Predicts eps, x0 or v from a noisy image, its timestep and, where ``num_classes`` > 0, its class.

    With the defaults and 3 channels it is the CIFAR-10 network of Ho et al., 35.7 M parameters. Parameters are float32;
    convolutions and matrix products run in ``dtype``; group statistics, softmax, the sinusoids of t and the last
    convolution are float32.

    Attributes:
        out_channels: channels of the output, which are those of the image.
        base_channels: width of the first level; that of level i is ``base_channels * channel_mults[i]``.
        channel_mults: one factor a level; each level but the last halves the image.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        attention_resolutions: heights of the levels whose blocks are followed by attention. The middle always has it.
        num_groups: of every group norm; layers with no more channels than that take groups of four channels.
        dropout: rate, before the second convolution of each block.
        num_classes: 0 for an unconditional network. Label ``num_classes`` stands for "no label".
        attention: "xla" or "cudnn", the implementation of ``jax.nn.dot_product_attention``.
        remat: what the backward pass computes again: "none", "blocks" (all but the blocks' inputs) or "dots" (all
            but the outputs of convolutions and matrix products).
        dtype: of the computation.
    """

    out_channels: int
    base_channels: int = 128
    channel_mults: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    num_groups: int = 32
    dropout: float = 0.0
    num_classes: int = 0
    attention: str = "xla"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array | None = None, train: bool = False) -> jax.Array:
        """The network's prediction, float32 [B H W C].

        Args:
            x_t: noisy images [B H W C], H and W divisible by 2^(levels - 1), square or not.
            t: int32 [B].
            label: int32 [B], 0 .. num_classes; None means "no label". Refused where num_classes is 0.
            train: whether dropout is on; it then needs an rng named "dropout".
        """
        self._check(x_t, label)
        # `train` is argument 3 of a residual block, the module itself being 0.
        common = {"num_groups": self.num_groups, "dtype": self.dtype}
        block = functools.partial(_with_remat(ResBlock, self.remat, (3,)), dropout=self.dropout, **common)
        attention = _with_remat(AttentionBlock, self.remat)
        attend = functools.partial(attention, implementation=self.attention, **common)
        embedding = self._embed(t, label)
        last_level = len(self.channel_mults) - 1

        h = conv(self.base_channels, train=train, dtype=self.dtype, name="conv_in")(x_t.astype(self.dtype))
        skips = [h]
        for level, mult in enumerate(self.channel_mults):
            for i in range(self.num_res_blocks):
                h = block(self.base_channels * mult, name=f"down_{level}_block_{i}")(h, embedding, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attend(name=f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level < last_level:
                h = conv(h.shape[-1], train=train, strides=2, dtype=self.dtype, name=f"down_{level}_downsample")(h)
                skips.append(h)

        h = block(h.shape[-1], name="middle_block_0")(h, embedding, train)
        h = attend(name="middle_attention")(h)
        h = block(h.shape[-1], name="middle_block_1")(h, embedding, train)

        for level, mult in reversed(list(enumerate(self.channel_mults))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(self.base_channels * mult, name=f"up_{level}_block_{i}")(h, embedding, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attend(name=f"up_{level}_attention_{i}")(h)
            if level > 0:
                h = h.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                h = conv(h.shape[-1], train=train, dtype=self.dtype, name=f"up_{level}_upsample")(h)

        # Few channels, so float32 is nearly free here, and the output keeps more than bfloat16's eight bits.
        h = nn.silu(group_norm(h, self.num_groups, jnp.float32, name="norm_out"))
        return conv(self.out_channels, train=train, kernel_init=zero_init, dtype=jnp.float32, name="conv_out")(h)

    def _embed(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """[B 4 base_channels]: sinusoids of t through an MLP, plus a learned vector a class."""
        width = 4 * self.base_channels
        embedding = timestep_embedding(t, self.base_channels)
        embedding = nn.Dense(width, kernel_init=default_init, dtype=self.dtype, name="time_dense_0")(embedding)
        embedding = nn.Dense(width, kernel_init=default_init, dtype=self.dtype, name="time_dense_1")(nn.silu(embedding))
        if self.num_classes:
            label = jnp.full(t.shape, self.num_classes) if label is None else label
            embedding += nn.Embed(self.num_classes + 1, width, dtype=self.dtype, name="class_embedding")(label)
        return embedding

    def _check(self, x_t: jax.Array, label: jax.Array | None) -> None:
        factor = 2 ** (len(self.channel_mults) - 1)
        if x_t.shape[1] % factor or x_t.shape[2] % factor:
            raise ValueError(
                f"data.image_size: {x_t.shape[1]}x{x_t.shape[2]} must be divisible by {factor}, since "
                f"model.channel_mults={tuple(self.channel_mults)} halves the image {len(self.channel_mults) - 1} times"
            )
        if label is not None and not self.num_classes:
            raise ValueError("model.num_classes=0: this network takes no label; set num_classes to train with labels")


class ResBlock(nn.Module):
    """norm, silu, conv, + time, norm, silu, dropout, conv, + shortcut; the last convolution starts at zero."""

    channels: int
    num_groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        """x [B H W C] and embedding [B D] -> [B H W channels]."""
        h = nn.silu(group_norm(x, self.num_groups, self.dtype, name="norm_0"))
        h = conv(self.channels, train=train, dtype=self.dtype, name="conv_0")(h)
        time = nn.Dense(self.channels, kernel_init=default_init, dtype=self.dtype, name="time_dense")(
            nn.silu(embedding)
        )
        h += time[:, None, None, :]
        h = nn.silu(group_norm(h, self.num_groups, self.dtype, name="norm_1"))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.channels, train=train, kernel_init=zero_init, dtype=self.dtype, name="conv_1")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, kernel_init=default_init, dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, one head, scale C^-1/2; the projection starts at zero."""

    num_groups: int
    implementation: Any  # "xla" or "cudnn"
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B H W C] -> [B H W C]."""
        batch, height, width, channels = x.shape
        h = group_norm(x, self.num_groups, self.dtype, name="norm").reshape(batch, height * width, 1, channels)
        dense = functools.partial(nn.Dense, channels, dtype=self.dtype)
        query, key, value = (dense(kernel_init=default_init, name=name)(h) for name in ("query", "key", "value"))
        # Logits and softmax are float32 inside, whatever the dtype of the operands.
        h = jax.nn.dot_product_attention(query, key, value, implementation=self.implementation)
        h = dense(kernel_init=zero_init, name="projection")(h)
        return x + h.reshape(x.shape)


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """sin(t w) then cos(t w), w_i = 10000^(-i / (dim // 2 - 1)), float32 [B dim]; an odd dim ends in a zero.

    The convention of Ho et al.'s code and of the checkpoints made with it; Vaswani et al. 2017 interleave the two.

    Args:
        t: int32 or float32 [B], in units of timesteps.
        dim: at least 4.
    """
    half = dim // 2
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half))
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1), ((0, 0), (0, dim % 2)))


def group_norm(x: jax.Array, num_groups: int, dtype: Any, name: str) -> jax.Array:
    """GroupNorm; where ``num_groups`` would leave a group a single channel, groups of four channels.

    A group of one would subtract again the shift by which a block is told the time and the class.
    """
    channels = x.shape[-1]
    groups = math.gcd(num_groups, channels)
    if groups == channels:
        groups = math.gcd(groups, max(channels // 4, 1))
    return nn.GroupNorm(groups, epsilon=NORM_EPSILON, dtype=dtype, name=name)(x)


def conv(
    channels: int, *, train: bool, strides: int = 1, kernel_init: Any = default_init, dtype: Any, name: str
) -> nn.Conv:
    """3x3, SAME: with stride 2 on an even size the padding lies at the bottom and on the right, as in TensorFlow."""
    return nn.Conv(
        channels,
        (3, 3),
        strides,
        padding="SAME",
        kernel_init=kernel_init,
        dtype=dtype,
        conv_general_dilated_cls=(lambda: conv_for_training) if train else None,
        name=name,
    )


def check_attention(implementation: str, head_widths: Sequence[int], dtype: Any, device: jax.Device) -> None:
    """Refuses an attention implementation that cannot run heads of these widths and this dtype on this device."""
    if implementation not in ATTENTIONS:
        raise ValueError(f"model.attention={implementation!r}: choose one of {', '.join(ATTENTIONS)}")
    if implementation == "xla":
        return
    problem = None
    widest = 256 if str(getattr(device, "compute_capability", "")).startswith("9.") else 128
    unfit = [width for width in head_widths if width % 8 or width > widest]
    if device.platform != "gpu":
        problem = f"cuDNN needs an NVIDIA GPU, and this is {device.platform}"
    elif jnp.dtype(dtype) != jnp.bfloat16:
        problem = f"cuDNN takes bfloat16, and dtype={jnp.dtype(dtype).name}"
    elif unfit:
        problem = (
            f"cuDNN takes head widths in steps of 8 to {widest} on a {device.device_kind}, and one here is {unfit[0]}"
        )
    if problem:
        raise ValueError(f"model.attention='cudnn': {problem}; use 'xla'")


def _with_remat(block: Any, remat: str, static_argnums: tuple[int, ...] = ()) -> Any:
    if remat not in REMATS:
        raise ValueError(f"train.remat={remat!r}: choose one of {', '.join(REMATS)}")
    if remat == "none":
        return block
    policy = None if remat == "blocks" else _save_dots
    return nn.remat(block, static_argnums=static_argnums, policy=policy)


def _save_dots(primitive: Any, *_: Any, **__: Any) -> bool:
    # jax.checkpoint_policies.dots_saveable knows matrix products only, and here nearly all the work is convolutions.
    return primitive.name in ("conv_general_dilated", "dot_general")
