"""The U-Net of "The Annotated Diffusion Model": ConvNeXt or ResNet blocks, and linear attention at every level."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import (
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

HEAD_WIDTH = 32  # of both kinds of attention, at every level


class LinearAttentionUNet(nn.Module):
    """Predicts eps, x0 or v from a noisy image, its timestep and, where ``num_classes`` > 0, its class.

    The network of Rogge & Rasul 2022 ("The Annotated Diffusion Model"), after Wang's ``denoising-diffusion-pytorch``,
    with three differences: every level takes its skip (theirs stores the first one and never reads it; here its blocks
    take the place of their last one), what ends an attention starts at zero, and so does the last convolution.
    Parameters are float32; convolutions and matrix products run in ``dtype``; group statistics, linear attention,
    softmax, the sinusoids of t and the last convolution are float32.

    Attributes:
        out_channels: channels of the output, which are those of the image.
        base_channels: width of the first level; that of level i is ``base_channels * channel_mults[i]``.
        channel_mults: one factor a level; each level but the last halves the image.
        num_res_blocks: blocks a level on the way down, and as many on the way up.
        block: "convnext" or "resnet".
        convnext_mult: by how much a convnext block is wider inside.
        num_heads: of linear and of full attention, each 32 wide.
        num_groups: of the blocks' group norms, a divisor of base_channels; None is 32, or fewer where base_channels is
            below 128. Attention normalises all channels together.
        dropout: rate, before the second 3x3 convolution of each block.
        num_classes: 0 for an unconditional network. Label ``num_classes`` stands for "no label".
        remat: what the backward pass computes again: "none", "blocks" (all but the blocks' inputs) or "dots" (all
            but the outputs of convolutions and matrix products).
        dtype: of the computation.
    """

    out_channels: int
    base_channels: int = 32
    channel_mults: Sequence[int] = (1, 2, 4)
    num_res_blocks: int = 2
    block: str = "convnext"
    convnext_mult: int = 2
    num_heads: int = 4
    num_groups: int | None = None
    dropout: float = 0.0
    num_classes: int = 0
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array | None = None, train: bool = False) -> jax.Array:
        """The network's prediction, float32 [B H W C].

        Args:
            x_t: noisy images [B H W C], H and W divisible by 2^(levels - 1), square or not: three levels take 28x28.
            t: int32 [B].
            label: int32 [B], 0 .. num_classes; None means "no label". Refused where num_classes is 0.
            train: whether dropout is on; it then needs an rng named "dropout".
        """
        check_inputs(x_t, label, self.channel_mults, self.num_classes)
        block = self._block_class()
        attention = {"num_heads": self.num_heads, "dtype": self.dtype}
        attend = functools.partial(with_remat(LinearAttention, self.remat), **attention)
        embedding = self._embed(t, label)
        widths = [self.base_channels * mult for mult in self.channel_mults]

        h = nn.Conv(self.base_channels, (7, 7), kernel_init=default_init, dtype=self.dtype, name="conv_in")(
            x_t.astype(self.dtype)
        )
        skips = []
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = block(width, name=f"down_{level}_block_{i}")(h, embedding, train)
            h = attend(name=f"down_{level}_attention")(h)
            skips.append(h)
            if level + 1 < len(widths):
                h = Conv(width, strides=2, padding=0, dtype=self.dtype, name=f"down_{level}_downsample")(h)

        h = block(widths[-1], name="middle_block_0")(h, embedding, train)
        h = with_remat(FullAttention, self.remat)(**attention, name="middle_attention")(h)
        h = block(widths[-1], name="middle_block_1")(h, embedding, train)

        for level in reversed(range(len(widths))):
            width = widths[max(level - 1, 0)]  # narrow before the image grows
            h = jnp.concatenate([h, skips[level]], axis=-1)
            for i in range(self.num_res_blocks):
                h = block(width, name=f"up_{level}_block_{i}")(h, embedding, train)
            h = attend(name=f"up_{level}_attention")(h)
            if level > 0:
                h = UpsampleConv(width, dtype=self.dtype, name=f"up_{level}_upsample")(h)

        return nn.Dense(self.out_channels, kernel_init=zero_init, dtype=jnp.float32, name="conv_out")(h)

    def _block_class(self) -> Any:
        """``block(channels, name=…)``."""
        num_groups = self.num_groups or default_num_groups(self.base_channels)
        if self.base_channels % num_groups:
            raise ValueError(f"model.num_groups={num_groups}: must divide model.base_channels={self.base_channels}")
        norm = functools.partial(GroupNorm, num_groups, dtype=self.dtype)
        common = {"norm": norm, "dropout": self.dropout, "dtype": self.dtype}
        kinds = {"convnext": (ConvNextBlock, {"mult": self.convnext_mult}), "resnet": (ResnetBlock, {})}
        if self.block not in kinds:
            raise ValueError(f"model.block={self.block!r}: choose one of {', '.join(kinds)}")
        kind, options = kinds[self.block]
        # `train` is argument 3 of a block, the module itself being 0.
        return functools.partial(with_remat(kind, self.remat, (3,)), **common, **options)

    def _embed(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """[B 4 base_channels]: sinusoids of t through an MLP, plus a learned vector a class."""
        width = 4 * self.base_channels
        dense = functools.partial(nn.Dense, width, kernel_init=default_init, dtype=self.dtype)
        embedding = dense(name="time_dense_0")(timestep_embedding(t, self.base_channels))
        embedding = dense(name="time_dense_1")(gelu(embedding))
        if self.num_classes:
            label = jnp.full(t.shape, self.num_classes) if label is None else label
            embedding += nn.Embed(self.num_classes + 1, width, dtype=self.dtype, name="class_embedding")(label)
        return embedding


class ConvNextBlock(nn.Module):
    """7x7 depthwise, + time, norm, 3x3 to ``mult`` times the width, gelu, norm, dropout, 3x3, + shortcut.

    After Liu et al. 2022 (2201.03545), with group norms and 3x3 convolutions where they have layer norm and 1x1.
    """

    channels: int
    mult: int
    norm: Any  # a GroupNorm but for its name
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        """x [B H W C] and embedding [B D] -> [B H W channels]."""
        width = x.shape[-1]
        depthwise = nn.Conv(
            width, (7, 7), feature_group_count=width, kernel_init=default_init, dtype=self.dtype, name="depthwise"
        )
        shift = _dense(width, self.dtype, "time_dense")(gelu(embedding))
        h = depthwise(x) + shift[:, None, None, :]
        norm_0 = self.norm(name="norm_0").fitted(h)
        h = gelu(Conv(self.mult * self.channels, dtype=self.dtype, name="conv_0")(h, norm_0))
        norm_1 = self.norm(name="norm_1").fitted(h)
        dropout = Dropout(self.dropout).drawn(x.shape[0], train)
        h = Conv(self.channels, dtype=self.dtype, name="conv_1")(h, lambda h: dropout(norm_1(h)))
        return stored(_shortcut(x, self.channels, self.dtype) + h)


class ResnetBlock(nn.Module):
    """3x3, norm, (scale + 1, shift) by time, silu, dropout, 3x3, norm, silu, + shortcut.

    The scale and shift are those of Nichol & Dhariwal 2021 (2102.09672).
    """

    channels: int
    norm: Any  # a GroupNorm but for its name
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        """x [B H W C] and embedding [B D] -> [B H W channels]."""
        time = _dense(2 * self.channels, self.dtype, "time_dense")(nn.silu(embedding))
        scale, shift = jnp.split(time[:, None, None, :], 2, axis=-1)
        h = Conv(self.channels, dtype=self.dtype, name="conv_0")(x)
        norm_0 = self.norm(name="norm_0").fitted(h)
        dropout = Dropout(self.dropout).drawn(x.shape[0], train)
        conv_1 = Conv(self.channels, dtype=self.dtype, name="conv_1")
        h = conv_1(h, lambda h: dropout(nn.silu(norm_0(h) * (scale + 1) + shift)))
        h = nn.silu(self.norm(name="norm_1")(h))
        return stored(_shortcut(x, self.channels, self.dtype) + h)


class LinearAttention(nn.Module):
    """x + norm(projection(attention(norm(x)))), with ``linear_attention`` over the pixels in heads of 32."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B H W C] -> [B H W C]."""
        query, key, value = _heads(_one_group_norm(self.dtype, "norm")(x), self.num_heads, self.dtype)
        h = linear_attention(query, key, value).astype(self.dtype).reshape(*x.shape[:3], -1)
        h = _dense(x.shape[-1], self.dtype, "projection")(h)
        return stored(x + _one_group_norm(self.dtype, "norm_out", zero_init)(h))


class FullAttention(nn.Module):
    """x + projection(attention(norm(x))), softmax attention over the pixels in heads of 32, scale 32^-1/2."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B H W C] -> [B H W C]."""
        query, key, value = _heads(_one_group_norm(self.dtype, "norm")(x), self.num_heads, self.dtype)
        # Logits and softmax are float32 inside, whatever the dtype of the operands.
        h = jax.nn.dot_product_attention(query, key, value).reshape(*x.shape[:3], -1)
        h = nn.Dense(x.shape[-1], kernel_init=zero_init, dtype=self.dtype, name="projection")(h)
        return stored(x + h)


def linear_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """out_n = sum_m (softmax_d(q_n) / sqrt(D) . softmax_m(k)_m) v_m: attention whose cost is linear in the positions.

    Shen et al. 2021 (1812.01243), "efficient attention": the query's softmax runs over its D features, the key's over
    the N positions, so that keys and values meet first, in a D x D matrix.

    Args:
        query: [B N heads D], and so are key and value.

    Returns:
        float32 [B N heads D].
    """
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query = jax.nn.softmax(query, axis=-1) / math.sqrt(query.shape[-1])
    context = jnp.einsum("bnhd,bnhe->bhde", jax.nn.softmax(key, axis=1), value)
    return jnp.einsum("bnhd,bhde->bnhe", query, context)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), the exact form, as in PyTorch; Flax's default is its tanh approximation."""
    return nn.gelu(x, approximate=False)


def _heads(x: jax.Array, num_heads: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Query, key and value [B H*W heads D] of x [B H W C]."""
    shape = (x.shape[0], x.shape[1] * x.shape[2], num_heads, HEAD_WIDTH)
    dense = functools.partial(nn.Dense, num_heads * HEAD_WIDTH, use_bias=False, kernel_init=default_init, dtype=dtype)
    return tuple(dense(name=name)(x).reshape(shape) for name in ("query", "key", "value"))


def _shortcut(x: jax.Array, channels: int, dtype: Any) -> jax.Array:
    return x if x.shape[-1] == channels else _dense(channels, dtype, "shortcut")(x)


def _dense(channels: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(channels, kernel_init=default_init, dtype=dtype, name=name)


def _one_group_norm(dtype: Any, name: str, scale_init: Any = nn.initializers.ones_init()) -> GroupNorm:  # noqa: B008
    return GroupNorm(1, scale_init=scale_init, dtype=dtype, name=name)
