"""The weight gradient that a CPU uses, against XLA's own and against a sum written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ddpm_jax import models
from ddpm_jax.models import convolution

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def operands(batch, height, width, channels, features):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, height, width, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, features))
    return x, kernel, jax.random.normal(keys[2], (batch, height, width, features))


def plain(x, kernel, strides=(1, 1)):
    return lax.conv_general_dilated(x, kernel, strides, ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)


def ours(x, kernel, strides=(1, 1)):
    return convolution.conv_for_training(x, kernel, strides, ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)


def test_weight_gradient_is_the_sum_that_it_says():
    x, _, g = (np.asarray(a, np.float64) for a in operands(2, 5, 4, 3, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((3, 3, 3, 2))
    for i in range(3):
        for j in range(3):
            expected[i, j] = np.einsum("bhwc,bhwd->cd", padded[:, i : i + 5, j : j + 4], g)
    np.testing.assert_allclose(
        convolution.weight_gradient(jnp.float32(x), jnp.float32(g)), expected, rtol=1e-5, atol=1e-5
    )


# One block; several blocks; a height that no block but a single row divides; not square.
@pytest.mark.parametrize("shape", [(1, 16, 16, 8, 8), (9, 32, 32, 8, 24), (64, 17, 16, 8, 8), (2, 16, 24, 16, 8)])
def test_both_gradients_equal_those_of_xla(shape):
    x, kernel, g = operands(*shape)
    y, pullback = jax.vjp(ours, x, kernel)
    y_plain, pullback_plain = jax.vjp(plain, x, kernel)
    np.testing.assert_array_equal(y, y_plain)
    for mine, theirs in zip(pullback(g), pullback_plain(g), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_used_where_it_pays_only():
    def uses_it(strides=(1, 1), dtype=jnp.float32, **shape):
        x, kernel, _ = operands(**({"batch": 1, "height": 16, "width": 16, "channels": 8, "features": 8} | shape))
        convolve = functools.partial(ours, strides=strides)
        return "custom_vjp" in str(jax.make_jaxpr(convolve)(x.astype(dtype), kernel.astype(dtype)))

    assert uses_it()
    assert not uses_it(height=8)
    assert not uses_it(channels=3)
    assert not uses_it(features=3)
    assert not uses_it(strides=(2, 2))
    assert not uses_it(dtype=jnp.bfloat16)


def test_the_network_has_a_forward_derivative_outside_training():
    unet = models.UNet(out_channels=1, base_channels=8, channel_mults=(1,), num_res_blocks=1)
    x_t, t = jnp.ones((1, 16, 16, 1)), jnp.zeros(1, jnp.int32)
    params = unet.init(jax.random.key(0), x_t, t)
    tangent = jax.jvp(lambda x: unet.apply(params, x, t), (x_t,), (x_t,))[1]
    assert tangent.shape == x_t.shape
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: unet.apply(params, x, t, train=True), (x_t,), (x_t,))


def test_other_platforms_keep_xlas_gradient():
    x, kernel, _ = operands(1, 16, 16, 8, 8)
    gradient = jax.jit(jax.grad(lambda kernel: ours(x, kernel).sum()))
    traced = gradient.trace(kernel)
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.while" not in traced.lower(lowering_platforms=("tpu",)).as_text()
