"""What the networks are built of."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NORM_EPSILON = 1e-6  # as Ho et al.
REMATS = ("none", "blocks", "dots")

# Glorot uniform, as Ho et al.; what ends a residual branch starts at zero, so that the network starts as a short one.
default_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zero_init = nn.initializers.zeros_init()


class Conv(nn.Module):
    """3x3, padded by ``padding`` at the top and on the left, and by 1 at the bottom and on the right.

    padding=0 belongs to strides=2, where it is TensorFlow's SAME on an even size.
    """

    channels: int
    strides: int = 1
    padding: int = 1
    kernel_init: Any = default_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, activate: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
        """Of ``activate(x)``, [B H W C]; for the gradient a CPU keeps x alone, and activates it again."""
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.channels))
        bias = self.param("bias", zero_init, (self.channels,))

        def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return _convolution(
                stored(activate(x).astype(self.dtype)),
                kernel.astype(self.dtype),
                strides=self.strides,
                padding=((self.padding, 1), (self.padding, 1)),
            )

        return recomputed(convolved)(x, kernel) + bias.astype(self.dtype)


class UpsampleConv(nn.Module):
    """Nearest neighbours to twice the height and width, then a 3x3 convolution padded by 1, in 4/9 of its products.

    A pixel becomes 2x2 equal ones, so that an output sees 2x2 pixels of the small image, some of them through two or
    four of the nine weights. With those added up first, the four outputs of a pixel are four 2x2 convolutions of the
    small image. The parameters are those of the 3x3 convolution, and the result is its own up to rounding.
    """

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B H W C] -> [B 2H 2W channels]."""
        batch, height, width, _ = x.shape
        kernel = self.param("kernel", default_init, (3, 3, x.shape[-1], self.channels))
        bias = self.param("bias", zero_init, (self.channels,))

        def outputs(x: jax.Array, kernel: jax.Array) -> jax.Array:
            x = x.astype(self.dtype)
            folded = [[_folded(_folded(kernel, i, 0), j, 1).astype(self.dtype) for j in (0, 1)] for i in (0, 1)]
            rows = [[_convolution(x, folded[i][j], padding=((1 - i, i), (1 - j, j))) for j in (0, 1)] for i in (0, 1)]
            return jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)  # [B H 2 W 2 channels]

        h = recomputed(outputs)(x, kernel)
        return h.reshape(batch, 2 * height, 2 * width, self.channels) + bias.astype(self.dtype)


def _convolution(x: jax.Array, kernel: jax.Array, *, strides: int = 1, padding: Sequence[tuple[int, int]]) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=layout)


def _folded(kernel: jax.Array, second: int, axis: int) -> jax.Array:
    """Three weights as the two that meet the small image: of the first of two equal pixels, or of the second."""
    before, middle, after = jnp.split(kernel, 3, axis)
    return jnp.concatenate([before + middle, after] if second else [before, middle + after], axis)


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the pixels and the channels of a group (1803.08494).

    The parameters and statistics of ``nn.GroupNorm``, in the order that XLA's code for a CPU does in half the time:
    sums over the pixels, channel by channel; channels to groups and back by tiny matrix products; x times one number a
    channel plus another. Groups within a loop over the pixels keep it from running along the channels.

    Statistics are float32, and the output is of ``dtype``.
    """

    num_groups: int
    epsilon: float = NORM_EPSILON
    affine: bool = True  # scale and bias
    scale_init: Any = nn.initializers.ones_init()
    dtype: Any = jnp.float32

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B H W C], C divisible by ``num_groups``."""
        return self.fitted(x)(x)

    @nn.compact
    def fitted(self, x: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """The function that normalises x; it can be applied again."""
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"{self.num_groups} groups: they must divide the {channels} channels")
        x = x.astype(jnp.float32)
        moments = jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))])  # [2 B C]
        members = _members(channels, self.num_groups)
        moments = jnp.einsum("mbc,gc->mbg", moments, members, precision=lax.Precision.HIGHEST)
        moments /= channels // self.num_groups
        mean, square = jnp.einsum("mbg,gc->mbc", moments, members, precision=lax.Precision.HIGHEST)
        scale = lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.epsilon)
        if self.affine:
            scale *= self.param("scale", self.scale_init, (channels,))
        shift = -mean * scale
        if self.affine:
            shift += self.param("bias", zero_init, (channels,))
        return lambda x: (x * scale[:, None, None] + shift[:, None, None]).astype(self.dtype)


@functools.cache
def _members(channels: int, num_groups: int) -> np.ndarray:
    """float32 [G C]: whether a channel belongs to a group."""
    return np.kron(np.eye(num_groups), np.ones((1, channels // num_groups))).astype(np.float32)


class Dropout(nn.Module):
    """Zeroes each value with the probability ``rate``, rounded to 2^-32, and divides the others by one minus it.

    As ``nn.Dropout``, with cheaper random numbers: an image is given two random words, and each of its values a hash of
    them and of its position, which is computed where it is used. ``jax.random`` takes six times as many operations a
    number, and on a CPU does them in a loop through memory.
    """

    rate: float

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B H W C] -> [B H W C]; x itself unless ``train``, which needs an rng named "dropout"."""
        return self.drawn(x.shape[0], train)(x)

    def drawn(self, num_images: int, train: bool) -> Callable[[jax.Array], jax.Array]:
        """The function that does it to so many images; it zeroes the same values each time."""
        threshold = min(round(self.rate * 2**32), 2**32 - 1)
        if not train or not threshold:
            return lambda x: x
        words = jax.random.bits(self.make_rng("dropout"), (2, num_images, 1, 1, 1), jnp.uint32)

        def dropout(x: jax.Array) -> jax.Array:
            position = jnp.arange(math.prod(x.shape[1:]), dtype=jnp.uint32).reshape(x.shape[1:])
            # Added before one hash and mixed in before a second: two images never see shifts of the same numbers.
            bits = _hash(_hash(position + words[0]) ^ words[1])
            return jnp.where(bits >= jnp.uint32(threshold), x / (1 - threshold / 2**32), 0)

        return dropout


def _hash(bits: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby 2011), uint32 to uint32, one to one: each bit depends on all."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def stored(x: jax.Array) -> jax.Array:
    """x; on a CPU it is stored before it is used, and its gradient too.

    XLA for a CPU would compute both anew for each that reads them: the gradient of a block's output from whatever came
    back through the layers above, once for each convolution that made it, and once in the order of the channels, which
    is slow.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``function``, of whose insides a CPU keeps nothing for the gradient: it computes them again from the arguments.

    There a page of new memory costs more than the elementwise functions that fill it. And what a gradient wants
    transposed, XLA would transpose and keep from the forward pass on; the barrier of ``jax.checkpoint`` has it wait for
    the gradient to come.
    """
    return lambda *args: lax.platform_dependent(*args, cpu=jax.checkpoint(function), default=function)


def timestep_embedding(t: jax.Array, dim: int, *, cosine_first: bool = False, freq_shift: float = 1.0) -> jax.Array:
    """sin(t w) then cos(t w), w_i = 10000^(-i / (dim // 2 - freq_shift)), float32 [B dim]; an odd dim ends in a zero.

    The defaults are the convention of Ho et al.'s code and of the checkpoints made with it; Vaswani et al. 2017
    interleave the two and shift by 0.

    Args:
        t: int32 or float32 [B], in units of timesteps.
        dim: at least 4.
        cosine_first: cos(t w) then sin(t w).
        freq_shift: 1 makes the slowest frequency 1 / 10000, 0 ends one step before it.
    """
    half = dim // 2
    exponents = -math.log(10000.0) / (half - freq_shift) * jnp.arange(half)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponents)
    parts = [jnp.cos(angles), jnp.sin(angles)] if cosine_first else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


def default_num_groups(base_channels: int) -> int:
    """32 as Ho et al., or fewer in a narrow network, so that a group of the first level has at least four channels.

    A group of one would subtract again the shift by which a block is told the time and the class.
    """
    return max(n for n in range(1, max(1, min(32, base_channels // 4)) + 1) if base_channels % n == 0)


def check_inputs(x_t: jax.Array, label: jax.Array | None, channel_mults: Sequence[int], num_classes: int) -> None:
    """Refuses an image that cannot be halved for each level but the last, and a label where there are no classes."""
    halvings = len(channel_mults) - 1
    factor = 2**halvings
    if x_t.shape[1] % factor or x_t.shape[2] % factor:
        raise ValueError(
            f"data.image_size: {x_t.shape[1]}x{x_t.shape[2]} must be divisible by {factor}, since "
            f"model.channel_mults={tuple(channel_mults)} halves the image {halvings} times"
        )
    if label is not None and not num_classes:
        raise ValueError("model.num_classes=0: this network takes no label; set num_classes to train with labels")


def with_remat(block: Any, remat: str, static_argnums: tuple[int, ...] = ()) -> Any:
    """The module class ``block``, rematerialised as ``remat`` says; ``static_argnums`` count from self, 0."""
    if remat not in REMATS:
        raise ValueError(f"train.remat={remat!r}: choose one of {', '.join(REMATS)}")
    if remat == "none":
        return block
    policy = None if remat == "blocks" else _save_dots
    return nn.remat(block, static_argnums=static_argnums, policy=policy)


def _save_dots(primitive: Any, *_: Any, **__: Any) -> bool:
    # jax.checkpoint_policies.dots_saveable knows matrix products only, and here nearly all the work is convolutions.
    return primitive.name in ("conv_general_dilated", "dot_general")
