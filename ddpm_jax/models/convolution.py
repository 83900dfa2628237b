"""A 3x3 convolution whose weight gradient is quick on a CPU too; elsewhere it is XLA's own."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SAME = ((1, 1), (1, 1))
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Of one matrix product: the expanded operands of that many positions stay in the caches of a CPU core.
BLOCK_POSITIONS = 2048


def conv_for_training(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """``lax.conv_general_dilated`` in the form that ``nn.Conv(conv_general_dilated=…)`` calls.

    On a CPU, XLA takes the weight gradient as a convolution with an H x W window, far from the speed of its matrix
    products. Where that matters, ``weight_gradient`` is used instead. Such a convolution has no forward-mode derivative
    (``jax.jvp``), so networks ask for it in training only.
    """
    same = kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and tuple(padding) == SAME
    if same and x.dtype == jnp.float32 and x.shape[1] >= 16 and min(kernel.shape[2:]) >= 8:
        return _conv3x3(x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """dW[i, j, c, d] = sum_bhw x[b, h + i - 1, w + j - 1, c] g[b, h, w, d], of a 3x3 convolution padded by 1.

    Shifting x by the three columns and g by the three rows makes one matrix product [3C, B H W] @ [B H W, 3D] of it,
    and nothing is expanded ninefold. It runs over blocks of rows.

    Args:
        x: input of the convolution, float32 [B H W C].
        g: gradient of its output, float32 [B H W D].

    Returns:
        float32 [3 3 C D].
    """
    batch, height, width, channels = x.shape
    rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * batch * width <= BLOCK_POSITIONS))
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    g = jnp.pad(g, ((0, 0), (1, 1), (0, 0), (0, 0)))

    def add_block(k: jax.Array, total: jax.Array) -> jax.Array:
        x_rows = lax.dynamic_slice_in_dim(x, k * rows, rows, axis=1)
        g_rows = lax.dynamic_slice_in_dim(g, k * rows, rows + 2, axis=1)
        shifted_x = jnp.concatenate([x_rows[:, :, j : j + width] for j in range(3)], -1).reshape(-1, 3 * channels)
        shifted_g = jnp.concatenate([g_rows[:, 2 - i : 2 - i + rows] for i in range(3)], -1).reshape(
            -1, 3 * g.shape[-1]
        )
        # Fused into the product, the two would be gathered anew for each of its tiles.
        left, right = lax.optimization_barrier((shifted_x, shifted_g))
        return total + lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, height // rows, add_block, jnp.zeros((3 * channels, 3 * g.shape[-1])))
    return total.reshape(3, channels, 3, -1).transpose(2, 0, 1, 3)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=DIMENSIONS)


_conv3x3 = jax.custom_vjp(_convolve)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel), (x, kernel)


def _backward(operands: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = operands
    dx = _convolve(g, kernel[::-1, ::-1].swapaxes(2, 3))
    return dx, lax.platform_dependent(x, g, cpu=weight_gradient, default=_xla_weight_gradient)


def _xla_weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel), shape)(g)[0]


_conv3x3.defvjp(_forward, _backward)
