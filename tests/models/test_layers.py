import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils import murmurhash3_32

from ddpm_jax.compiler import compiler_options
from ddpm_jax.models import layers
from ddpm_jax.models.layers import (
    Conv,
    Dropout,
    GroupNorm,
    UpsampleConv,
    default_num_groups,
    recomputed,
    stored,
    timestep_embedding,
)

# Convolutions


def test_kernels_start_glorot_uniform():
    kernel = Conv(64).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))["params"]["kernel"]
    bound = math.sqrt(6 / (9 * 32 + 9 * 64))
    assert 0.999 * bound < jnp.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.02)


def test_the_padding_of_a_strided_convolution_lies_at_the_bottom_and_on_the_right():
    x = jnp.arange(1.0, 65.0).reshape(1, 8, 8, 1)
    down = Conv(1, strides=2, padding=0)
    for row, column in np.ndindex(3, 3):
        kernel = np.zeros((3, 3, 1, 1), np.float32)
        kernel[row, column] = 1
        found = down.apply({"params": {"kernel": kernel, "bias": np.zeros(1)}}, x)
        expected = np.pad(x[0, :, :, 0], ((0, 2), (0, 2)))[row : row + 8 : 2, column : column + 8 : 2]
        np.testing.assert_array_equal(found[0, :, :, 0], expected)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("activate", [lambda x: x, nn.silu])
def test_a_convolution_and_its_gradient_against_flax(strides, padding, activate):
    x = jax.random.normal(jax.random.key(1), (2, 8, 6, 5))
    ours, flaxs = Conv(7, strides, padding), nn.Conv(7, (3, 3), strides, padding=((padding, 1), (padding, 1)))
    params = random_params(ours, x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_params(flaxs, x))

    def values_and_gradients(apply):
        return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(apply({"params": params}, x))), (0, 1)))

    found = values_and_gradients(lambda variables, x: ours.apply(variables, x, activate))(params, x)
    expected = values_and_gradients(lambda variables, x: flaxs.apply(variables, activate(x)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def nearest_then_3x3(params, x):
    """In float64: each pixel four times, a border of zeros, nine shifted products."""
    x, kernel = np.asarray(x, np.float64), np.asarray(params["kernel"], np.float64)
    large = np.pad(np.kron(x, np.ones((1, 2, 2, 1))), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = 2 * x.shape[1], 2 * x.shape[2]
    shifted = (large[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3))
    return sum(shifted) + np.asarray(params["bias"], np.float64)


def random_params(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("shape", [(2, 4, 4, 5), (1, 3, 5, 2), (2, 1, 1, 3)])
def test_upsample_conv_is_a_3x3_convolution_of_the_nearest_neighbours(shape):
    module, x = UpsampleConv(7, jnp.float32), jax.random.normal(jax.random.key(1), shape)
    params = random_params(module, x)
    found = jax.jit(module.apply)({"params": params}, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, nearest_then_3x3(params, x), atol=2e-5)


def test_upsample_conv_has_the_gradient_of_a_3x3_convolution_of_the_nearest_neighbours():
    module, x = UpsampleConv(3, jnp.float32), jax.random.normal(jax.random.key(1), (2, 4, 6, 5))
    params, plain = random_params(module, x), nn.Conv(3, (3, 3))

    def two_steps(variables, x):
        return plain.apply(variables, jax.image.resize(x, (2, 8, 12, 5), "nearest"))

    def gradient(apply):
        return jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(apply({"params": params}, x))), (0, 1)))(params, x)

    found, expected = gradient(module.apply), gradient(two_steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_upsample_conv_has_the_parameters_of_a_3x3_convolution():
    module, x = UpsampleConv(64, jnp.float32), jnp.zeros((1, 4, 4, 32))
    params, plain = (m.init(jax.random.key(0), x)["params"] for m in (module, Conv(64)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain)
    np.testing.assert_allclose(params["kernel"].std(), plain["kernel"].std(), rtol=0.02)
    assert not params["bias"].any()


def test_upsample_conv_multiplies_four_ninths_as_often():
    module, x = UpsampleConv(64, jnp.float32), jnp.zeros((1, 32, 32, 64))
    flops = jax.jit(module.apply).lower({"params": random_params(module, x)}, x).cost_analysis()["flops"]
    assert flops < 0.46 * 2 * 9 * 64 * 64 * 64**2


def test_upsample_conv_in_bfloat16_adds_its_weights_in_float32():
    small = 2.0**-8  # 1 + small is no bfloat16
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1 + small).at[2, 1].set(-1)
    variables = {"params": {"kernel": kernel, "bias": jnp.zeros(1)}}
    found = UpsampleConv(1, jnp.bfloat16).apply(variables, jnp.ones((1, 1, 1, 1), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0, :, :, 0].astype(jnp.float32), [[small, small], [1, 1]])


# Group norms


@pytest.mark.parametrize("num_groups", [1, 4, 12])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_group_norm_and_its_gradient_against_flax(num_groups, offset):
    x = jax.random.normal(jax.random.key(0), (3, 5, 4, 12)) * jnp.arange(1.0, 13.0) + offset
    scale, bias = jax.random.normal(jax.random.key(1), (2, 12))
    variables = {"params": {"scale": scale, "bias": bias}}

    def both(module):
        output, pull_back = jax.vjp(module.apply, variables, x)
        return output, pull_back(jnp.sin(output))

    ours, flaxs = both(GroupNorm(num_groups)), both(nn.GroupNorm(num_groups, epsilon=1e-6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, flaxs)


def test_group_norm_without_scale_and_bias_against_float64():
    x = jax.random.normal(jax.random.key(0), (3, 5, 4, 12)) + jnp.arange(12.0)
    groups = np.asarray(x, np.float64).reshape(3, 20, 3, 4)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    module = GroupNorm(3, affine=False)
    assert module.init(jax.random.key(0), x) == {}
    np.testing.assert_allclose(
        module.apply({}, x), ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape), atol=5e-5
    )


def test_group_norm_where_the_mean_is_large_against_float64():
    x = np.asarray(30 + jax.random.normal(jax.random.key(0), (2, 8, 8, 8)))
    groups = np.asarray(x, np.float64).reshape(2, 64, 2, 4)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    # E[x^2] - E[x]^2 loses 30^2 float32 units of roundoff, here as in Flax.
    np.testing.assert_allclose(GroupNorm(2, affine=False).apply({}, x), expected, atol=2e-3)


def test_group_norm_where_rounding_makes_a_variance_negative():
    x = jnp.broadcast_to(jnp.linspace(1.0, 2000.0, 1000)[:, None, None, None], (1000, 3, 3, 8))
    found = GroupNorm(2, affine=False).apply({}, x)
    moments = jnp.mean(x, (1, 2, 3)), jnp.mean(jnp.square(x), (1, 2, 3))
    assert (moments[1] - jnp.square(moments[0])).min() < -1e-3
    assert jnp.isfinite(found).all()


def test_group_norm_in_bfloat16_has_float32_statistics():
    x = (64 + jax.random.normal(jax.random.key(0), (2, 16, 16, 8))).astype(jnp.bfloat16)
    found = GroupNorm(2, affine=False, dtype=jnp.bfloat16).apply({}, x)
    assert found.dtype == jnp.bfloat16
    groups = np.asarray(x, np.float64).reshape(2, 256, 2, 4)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0.01, atol=0.01)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"^3 groups: they must divide the 8 channels"):
        GroupNorm(3).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))


# Groups, time


@pytest.mark.parametrize(
    ("base_channels", "groups"), [(128, 32), (160, 32), (64, 16), (32, 8), (8, 2), (4, 1), (6, 1), (30, 6)]
)
def test_groups_of_at_least_four_channels(base_channels, groups):
    """A group of one channel would take the time and the class away, which a block adds to every pixel alike."""
    assert default_num_groups(base_channels) == groups


@pytest.mark.parametrize("dim", [4, 8, 9, 128])
def test_timestep_embedding_against_float64(dim):
    t = np.array([0, 1, 2, 499, 500, 999])
    half = dim // 2
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((6, dim % 2))], axis=1)
    found = timestep_embedding(jnp.asarray(t), dim)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_allclose(found[1, [0, half - 1, half]], [math.sin(1), 1e-4, math.cos(1)], rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_timestep_is_another_to_the_network(dtype):  # bfloat16 holds 507 of the first 1000 integers
    embeddings = np.asarray(timestep_embedding(jnp.arange(1000), 128).astype(dtype).astype(jnp.float32))
    distances = np.linalg.norm(embeddings[1:] - embeddings[:-1], axis=1)
    assert distances.min() > 0.5


# Dropout


def dropped(x, rate, seed=0):
    return Dropout(rate).apply({}, x, True, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("height", [32, 33, 1])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate, height):
    x = jnp.full((6, height, 64, 32), 3.0)
    found = np.asarray(dropped(x, rate))
    spread = math.sqrt(rate * (1 - rate) / found.size)
    assert abs((found == 0).mean() - rate) < 4 * spread
    np.testing.assert_allclose(found[found != 0], 3 / (1 - rate), rtol=1e-6)
    assert abs(found.mean() / 3 - 1) < 4 * spread / (1 - rate)


def test_dropout_draws_every_value_by_itself():
    """Shares of two zeroes at once: in one image above and below, side by side, in two images, in two channels."""
    lost = np.asarray(dropped(jnp.ones((8, 32, 32, 32)), 0.3) == 0)
    pairs = [
        (lost[:, :16], lost[:, 16:]),
        (lost[:, :, 1:], lost[:, :, :-1]),
        (lost[1:], lost[:-1]),
        (lost[..., 1:], lost[..., :-1]),
    ]
    for one, other in pairs:
        assert abs((one & other).mean() - 0.09) < 4 * math.sqrt(0.09 * 0.91 / one.size)


def test_no_image_is_dropped_as_another_was_nor_as_a_shift_of_it():
    """Over 300 images and keys: of each two, the pixels that both lose, at every shift along the position."""
    shape = (2, 8, 8, 16)
    lost = np.concatenate([dropped(jnp.ones(shape), 0.5, seed) == 0 for seed in range(150)]).reshape(300, -1)
    signs = np.fft.rfft(2.0 * lost - 1, axis=1)
    for i in range(299):
        agreement = np.fft.irfft(signs[i].conj() * signs[i + 1 :], axis=1) / lost.shape[1]
        assert np.abs(agreement).max() < 7 / math.sqrt(lost.shape[1])


def test_the_hash_is_murmurs_and_spreads_every_bit():
    words = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    rotate = lambda x, n: (x << np.uint32(n)) | (x >> np.uint32(32 - n))  # noqa: E731
    mixed = rotate(words * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)  # MurmurHash3 of four bytes, seed 0
    mixed = (rotate(mixed, 13) * np.uint32(5) + np.uint32(0xE6546B64)) ^ np.uint32(4)
    expected = [murmurhash3_32(int(word), seed=0, positive=True) for word in words.view(np.int32)]
    np.testing.assert_array_equal(layers._hash(jnp.asarray(mixed)), np.array(expected, np.uint32))
    for bit in range(32):
        changed = layers._hash(jnp.asarray(words)) ^ layers._hash(jnp.asarray(words ^ np.uint32(1 << bit)))
        share = np.unpackbits(np.asarray(changed).view(np.uint8).reshape(-1, 4), axis=1).mean(0)
        assert np.abs(share - 0.5).max() < 0.06


def test_dropout_is_its_keys_alone():
    x = jnp.ones((2, 4, 4, 8))
    np.testing.assert_array_equal(dropped(x, 0.5), dropped(x, 0.5))
    assert (dropped(x, 0.5) != dropped(x, 0.5, seed=1)).any()


def test_no_dropout_needs_no_key():
    x = jnp.ones((2, 4, 4, 8), jnp.bfloat16)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, True), x)
    assert dropped(x, 0.5).dtype == jnp.bfloat16


# Stored, and computed again


def chain(x):
    """Each summand of its gradient is needed by a reader of the sum."""
    return jnp.sum(jnp.sin(stored(jnp.exp(x)) * x))


def again(x):
    """Its gradient needs tanh(x) and sin(tanh(x))."""
    return jnp.sum(recomputed(lambda x: jnp.exp(jnp.sin(jnp.tanh(x))))(x))


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (chain, lambda x: jnp.sum(jnp.sin(jnp.exp(x) * x))),
        (again, lambda x: jnp.sum(jnp.exp(jnp.sin(jnp.tanh(x))))),
    ],
)
def test_no_derivative_changes(ours, plain):
    x = jnp.linspace(-1.0, 1.0, 5)
    np.testing.assert_allclose(ours(x), plain(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(ours, (x,), (x,))[1], jax.jvp(plain, (x,), (x,))[1], rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(ours)(x), jax.hessian(plain)(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(x[:, None]), jax.vmap(jax.grad(plain))(x[:, None]), rtol=1e-6)


def counts(function, operation):
    """In value and gradient as they are lowered for a CPU, a TPU and a GPU."""
    traced = jax.jit(jax.value_and_grad(function)).trace(jnp.ones(5))
    programs = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda"))
    return [program.count(f"stablehlo.{operation}") for program in programs]


def test_a_cpu_alone_stores_a_value_and_its_gradient():
    assert counts(chain, "optimization_barrier") == [2, 0, 0]


def test_a_cpu_alone_computes_again():
    assert counts(again, "tanh") == [2, 1, 1]
    assert counts(again, "optimization_barrier") == [1, 0, 0]  # it waits for the gradient


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA for a CPU keeps it")
def test_a_cpu_keeps_less_for_the_gradient():
    kernels = jax.random.normal(jax.random.key(0), (8, 3, 3, 16, 16))
    params, x = [{"params": {"kernel": kernel, "bias": jnp.zeros(16)}} for kernel in kernels], jnp.ones((4, 32, 32, 16))

    def memory(layer):
        def loss(params):
            return jnp.sum(functools.reduce(lambda h, variables: layer(variables, h), params, x))

        return (
            jax.jit(jax.grad(loss), compiler_options=compiler_options("cpu")).lower(params).compile().memory_analysis()
        )

    ours = memory(lambda variables, h: Conv(16).apply(variables, h, nn.silu)).temp_size_in_bytes
    flaxs = memory(lambda variables, h: nn.Conv(16, (3, 3)).apply(variables, nn.silu(h))).temp_size_in_bytes
    assert ours < 0.6 * flaxs


def test_a_function_drawn_or_fitted_once_is_the_same_each_time():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    norm = lambda module: [f(x) for f in [module.fitted(x)] * 2] + [module(x)]  # noqa: E731
    for found in nn.apply(norm, GroupNorm(2, affine=False))({})[1:]:
        np.testing.assert_array_equal(found, GroupNorm(2, affine=False).apply({}, x))
    drop = lambda module: [f(x) for f in [module.drawn(2, True)] * 2]  # noqa: E731
    one, two = nn.apply(drop, Dropout(0.5))({}, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(one, two)
    assert (one == 0).any()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA for a CPU is told so")
def test_xla_keeps_the_barrier():
    compiled = jax.jit(jax.grad(chain), compiler_options=compiler_options("cpu")).lower(jnp.ones(5)).compile()
    assert "opt-barrier" in compiled.as_text()
