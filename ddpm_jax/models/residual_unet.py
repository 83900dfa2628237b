"""The residual U-Net of the Keras example of denoising diffusion: told the noise level instead of the timestep."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.models.layers import (
    Conv,
    GroupNorm,
    check_inputs,
    default_init,
    default_num_groups,
    stored,
    with_remat,
    zero_init,
)

MAX_FREQUENCY = 1000.0  # of the noise embedding; the lowest is 1


class ResidualUNet(nn.Module):
    """Predicts eps, x0 or v from a noisy image, its noise level 1 - alpha_bar and, with ``num_classes`` > 0, its class.

    The network of Béres 2022 ("Denoising Diffusion Implicit Models", Keras examples) and of Foster 2023 (Generative
    Deep Learning, chapter 8), which the defaults are: widths 32, 64, 96, two blocks each, 128 in the middle. One thing
    differs: its batch norms, without scale and shift, are group norms here, without them too. An average of the
    parameters has no statistics of its own to go with batch norms: those that belong to other parameters turn its
    pictures black. Parameters are float32; convolutions run in ``dtype``; group statistics, the sinusoids of the noise
    level and the last convolution are float32.

    Attributes:
        out_channels: channels of the output, which are those of the image.
        base_channels: width of the first level, and of the noise embedding that is laid beside the image; that of
            level i is ``base_channels * channel_mults[i]``.
        channel_mults: one factor a level; each level but the last halves the image. The last is the middle.
        num_res_blocks: residual blocks a level on the way down, in the middle, and on the way up.
        num_groups: of the group norms, a divisor of base_channels; None is 32, or fewer where base_channels is below
            128.
        num_classes: 0 for an unconditional network. Label ``num_classes`` stands for "no label".
        remat: what the backward pass computes again: "none", "blocks" (all but the blocks' inputs) or "dots" (all
            but the outputs of convolutions and matrix products).
        dtype: of the computation.
    """

    takes: ClassVar[str] = "noise_level"  # in place of t

    out_channels: int
    base_channels: int = 32
    channel_mults: Sequence[int] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    num_groups: int | None = None
    num_classes: int = 0
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_t: jax.Array, noise_level: jax.Array, label: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """The network's prediction, float32 [B H W C].

        Args:
            x_t: noisy images [B H W C], H and W divisible by 2^(levels - 1), square or not.
            noise_level: 1 - alpha_bar, the variance of the noise in x_t, float [B] in [0, 1].
            label: int32 [B], 0 .. num_classes; None means "no label". Refused where num_classes is 0.
            train: as for every network; here it makes no difference.
        """
        self._check(x_t, noise_level, label)
        num_groups = self.num_groups or default_num_groups(self.base_channels)
        block = functools.partial(with_remat(ResidualBlock, self.remat), num_groups=num_groups, dtype=self.dtype)
        *widths, middle = (self.base_channels * mult for mult in self.channel_mults)

        h = nn.Dense(self.base_channels, kernel_init=default_init, dtype=self.dtype, name="conv_in")(x_t)
        embedding = self._embed(noise_level, label).astype(self.dtype)[:, None, None, :]
        h = jnp.concatenate([h, jnp.broadcast_to(embedding, (*h.shape[:3], embedding.shape[-1]))], axis=-1)

        skips = []
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = block(width, name=f"down_{level}_block_{i}")(h)
                skips.append(h)
            h = downsample(h)

        for i in range(self.num_res_blocks):
            h = block(middle, name=f"middle_block_{i}")(h)

        for level, width in reversed(list(enumerate(widths))):
            h = upsample(h)
            for i in range(self.num_res_blocks):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(width, name=f"up_{level}_block_{i}")(h)

        return nn.Dense(self.out_channels, kernel_init=zero_init, dtype=jnp.float32, name="conv_out")(h)

    def _embed(self, noise_level: jax.Array, label: jax.Array | None) -> jax.Array:
        """[B base_channels]: sinusoids of the noise level, plus a learned vector a class."""
        embedding = noise_embedding(noise_level, self.base_channels)
        if self.num_classes:
            label = jnp.full(noise_level.shape, self.num_classes) if label is None else label
            embedding += nn.Embed(self.num_classes + 1, self.base_channels, name="class_embedding")(label)
        return embedding

    def _check(self, x_t: jax.Array, noise_level: jax.Array, label: jax.Array | None) -> None:
        check_inputs(x_t, label, self.channel_mults, self.num_classes)
        if not jnp.issubdtype(noise_level.dtype, jnp.floating):
            raise ValueError(
                f"noise_level: is {noise_level.dtype}; this network takes 1 - alpha_bar in [0, 1] and no timestep"
            )
        if self.base_channels % (self.num_groups or 1):
            raise ValueError(
                f"model.num_groups={self.num_groups}: must divide model.base_channels={self.base_channels}"
            )


class ResidualBlock(nn.Module):
    """norm without scale and shift, conv, silu, conv, + shortcut."""

    channels: int
    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B H W C] -> [B H W channels]."""
        norm = GroupNorm(self.num_groups, affine=False, dtype=self.dtype, name="norm")
        h = Conv(self.channels, dtype=self.dtype, name="conv_0")(x, norm.fitted(x))
        h = Conv(self.channels, dtype=self.dtype, name="conv_1")(h, nn.silu)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, kernel_init=default_init, dtype=self.dtype, name="shortcut")(x)
        return stored(x + h)


def noise_embedding(noise_level: jax.Array, dim: int) -> jax.Array:
    """sin(2 pi f_i s) then cos(2 pi f_i s), f_i = 1000^(i / (dim / 2 - 1)), s the noise level: float32 [B dim].

    An odd ``dim`` ends in a zero.

    Args:
        noise_level: 1 - alpha_bar, float [B] in [0, 1].
        dim: at least 4.
    """
    frequencies = np.geomspace(1.0, MAX_FREQUENCY, dim // 2)
    angles = noise_level.astype(jnp.float32)[:, None] * jnp.asarray(2 * np.pi * frequencies, jnp.float32)
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def downsample(x: jax.Array) -> jax.Array:
    """The mean of each 2x2 pixels: [B H W C] -> [B H/2 W/2 C], H and W even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Twice the height and width, bilinear between the centres of the pixels: [B H W C] -> [B 2H 2W C].

    That is Keras' ``UpSampling2D(interpolation="bilinear")`` and PyTorch's with ``align_corners=False``.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        first, last = (lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, size - 1))
        before = jnp.concatenate([first, lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis)
        after = jnp.concatenate([lax.slice_in_dim(x, 1, size, axis=axis), last], axis)
        shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
        x = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1).reshape(shape)
    return x
