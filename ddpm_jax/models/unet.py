"""The U-Net of Ho et al. 2020 (appendix B): residual blocks, attention, skips, time and class embedding."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models.layers import (
    NORM_EPSILON,
    Conv,
    Dropout,
    GroupNorm,
    UpsampleConv,
    check_inputs,
    default_init,
    default_num_groups,
    stored,
    timestep_embedding,
    with_remat,
    zero_init,
)

ATTENTIONS = ("xla", "cudnn")


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
        attention_resolutions: heights of the levels whose blocks are followed by attention.
        up_attention_resolutions: the same on the way up, where that differs; None: it does not.
        middle_attention: whether there is attention between the two blocks of the middle.
        middle_attention_groups: of its norm; None: ``num_groups``, 0: it has no norm.
        attention_head_channels: width of an attention head; None is one head.
        num_groups: of every group norm, a divisor of ``base_channels``; None is ``default_num_groups``.
        norm_epsilon: of every group norm.
        time_scale_shift: the time scales and shifts the second norm of each block, h (1 + scale) + shift (Dhariwal &
            Nichol 2021, section 3), in place of being added before it.
        downsample_padding: 0 pads a halving convolution at the bottom and on the right, as Ho et al.; 1 on all sides.
        flip_sin_to_cos: the embedding of t begins with the cosines.
        freq_shift: see ``timestep_embedding``.
        dropout: rate, before the second convolution of each block.
        num_classes: 0 for an unconditional network.
        null_label: whether label ``num_classes`` stands for "no label".
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
    up_attention_resolutions: Sequence[int] | None = None
    middle_attention: bool = True
    middle_attention_groups: int | None = None
    attention_head_channels: int | None = None
    num_groups: int | None = None
    norm_epsilon: float = NORM_EPSILON
    time_scale_shift: bool = False
    downsample_padding: int = 0
    flip_sin_to_cos: bool = False
    freq_shift: float = 1.0
    dropout: float = 0.0
    num_classes: int = 0
    null_label: bool = True
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
        num_groups = self.num_groups or default_num_groups(self.base_channels)
        norm = functools.partial(GroupNorm, num_groups=num_groups, epsilon=self.norm_epsilon)
        block, attend = self._blocks(norm)
        embedding = self._embed(t, label)
        attending_up = self.up_attention_resolutions
        attending_up = self.attention_resolutions if attending_up is None else attending_up
        last_level = len(self.channel_mults) - 1

        h = Conv(self.base_channels, dtype=self.dtype, name="conv_in")(x_t.astype(self.dtype))
        skips = [h]
        for level, mult in enumerate(self.channel_mults):
            for i in range(self.num_res_blocks):
                h = block(self.base_channels * mult, name=f"down_{level}_block_{i}")(h, embedding, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attend(name=f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level < last_level:
                halve = functools.partial(Conv, strides=2, padding=self.downsample_padding, dtype=self.dtype)
                h = halve(h.shape[-1], name=f"down_{level}_downsample")(h)
                skips.append(h)

        h = block(h.shape[-1], name="middle_block_0")(h, embedding, train)
        if self.middle_attention:
            groups = num_groups if self.middle_attention_groups is None else self.middle_attention_groups
            middle_norm = functools.partial(norm, num_groups=groups) if groups else None
            h = attend(norm=middle_norm, name="middle_attention")(h)
        h = block(h.shape[-1], name="middle_block_1")(h, embedding, train)

        for level, mult in reversed(list(enumerate(self.channel_mults))):
            for i in range(self.num_res_blocks + 1):
                h = stored(jnp.concatenate([h, skips.pop()], axis=-1))
                h = block(self.base_channels * mult, name=f"up_{level}_block_{i}")(h, embedding, train)
                if h.shape[1] in attending_up:
                    h = attend(name=f"up_{level}_attention_{i}")(h)
            if level > 0:
                h = UpsampleConv(h.shape[-1], dtype=self.dtype, name=f"up_{level}_upsample")(h)

        # Few channels, so float32 is nearly free here, and the output keeps more than bfloat16's eight bits.
        h = nn.silu(norm(dtype=jnp.float32, name="norm_out")(h))
        return Conv(self.out_channels, kernel_init=zero_init, dtype=jnp.float32, name="conv_out")(h)

    def _blocks(self, norm: Any) -> tuple[Any, Any]:
        """What makes a residual block and an attention block."""
        # `train` is argument 3 of a residual block, the module itself being 0.
        block = functools.partial(
            with_remat(ResBlock, self.remat, (3,)),
            norm=norm,
            dropout=self.dropout,
            time_scale_shift=self.time_scale_shift,
            dtype=self.dtype,
        )
        attend = functools.partial(
            with_remat(AttentionBlock, self.remat),
            norm=norm,
            head_channels=self.attention_head_channels,
            implementation=self.attention,
            dtype=self.dtype,
        )
        return block, attend

    def _embed(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """[B 4 base_channels]: sinusoids of t through an MLP, plus a learned vector a class."""
        width = 4 * self.base_channels
        embedding = timestep_embedding(
            t, self.base_channels, cosine_first=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )
        embedding = nn.Dense(width, kernel_init=default_init, dtype=self.dtype, name="time_dense_0")(embedding)
        embedding = nn.Dense(width, kernel_init=default_init, dtype=self.dtype, name="time_dense_1")(nn.silu(embedding))
        if self.num_classes:
            label = jnp.full(t.shape, self.num_classes) if label is None else label
            rows = self.num_classes + self.null_label
            embedding += nn.Embed(rows, width, dtype=self.dtype, name="class_embedding")(label)
        return embedding

    def _check(self, x_t: jax.Array, label: jax.Array | None) -> None:
        check_inputs(x_t, label, self.channel_mults, self.num_classes)
        if label is None and self.num_classes and not self.null_label:
            raise ValueError(
                "model.null_label=False: this network knows no image without a label; give label, int32 [B]"
            )
        if self.base_channels % (self.num_groups or 1):
            raise ValueError(
                f"model.num_groups={self.num_groups}: must divide model.base_channels={self.base_channels}"
            )
        width, heads = self.attention_head_channels, [self.base_channels * mult for mult in self.channel_mults]
        if any(channels % (width or channels) for channels in heads):
            raise ValueError(f"model.attention_head_channels={width}: must divide the channels of every level, {heads}")


class ResBlock(nn.Module):
    """norm, silu, conv, + time, norm, silu, dropout, conv, + shortcut; the last convolution starts at zero.

    With ``time_scale_shift`` the time acts right after the second norm.
    """

    channels: int
    norm: Any  # a GroupNorm but for its dtype and name
    dropout: float
    time_scale_shift: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        """x [B H W C] and embedding [B D] -> [B H W channels]."""
        norm_0 = self.norm(dtype=self.dtype, name="norm_0").fitted(x)
        h = Conv(self.channels, dtype=self.dtype, name="conv_0")(x, lambda x: nn.silu(norm_0(x)))
        width = self.channels * (1 + self.time_scale_shift)
        time = nn.Dense(width, kernel_init=default_init, dtype=self.dtype, name="time_dense")(nn.silu(embedding))
        time = time[:, None, None, :]
        scale, shift = jnp.split(time, 2, axis=-1) if self.time_scale_shift else (None, time)
        h = stored(h + shift if scale is None else h)
        norm_1 = self.norm(dtype=self.dtype, name="norm_1").fitted(h)
        dropout = Dropout(self.dropout).drawn(x.shape[0], train)

        def activate(h: jax.Array) -> jax.Array:
            h = norm_1(h)
            if scale is not None:
                h = h * (1 + scale) + shift
            return dropout(nn.silu(h))

        h = Conv(self.channels, kernel_init=zero_init, dtype=self.dtype, name="conv_1")(h, activate)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, kernel_init=default_init, dtype=self.dtype, name="shortcut")(x)
        return stored(x + h)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, scale (channels of a head)^-1/2; the projection starts at zero."""

    norm: Any  # a GroupNorm but for its dtype and name, or None
    head_channels: int | None  # None is one head
    implementation: Any  # "xla" or "cudnn"
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B H W C] -> [B H W C]."""
        batch, height, width, channels = x.shape
        h = x if self.norm is None else self.norm(dtype=self.dtype, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        dense = functools.partial(nn.Dense, channels, dtype=self.dtype)
        query, key, value = (
            dense(kernel_init=default_init, name=name)(h).reshape(batch, h.shape[1], -1, self.head_channels or channels)
            for name in ("query", "key", "value")
        )
        # Logits and softmax are float32 inside, whatever the dtype of the operands.
        attention = functools.partial(jax.nn.dot_product_attention, implementation=self.implementation)
        on_cpu = jax.checkpoint(_one_head_attention) if query.shape[2] == 1 else attention
        h = lax.platform_dependent(query, key, value, cpu=on_cpu, default=attention)
        h = dense(kernel_init=zero_init, name="projection")(h.reshape(batch, -1, channels))
        return stored(x + h.reshape(x.shape))


def _one_head_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """``jax.nn.dot_product_attention`` of [B T 1 H], for which XLA for a CPU transposes the weights four times."""
    query, key, value = (x.squeeze(2) for x in (query, key, value))
    query *= query.shape[-1] ** -0.5
    logits = jnp.einsum("bth,bsh->bts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return lax.dot_general(weights, value, (((2,), (1,)), ((0,), (0,))))[:, :, None]


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
