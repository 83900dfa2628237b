import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import ResidualUNet, takes_noise_level
from ddpm_jax.models.residual_unet import ResidualBlock, downsample, noise_embedding, upsample

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"out_channels": 1, "base_channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1}
SHAPE = (2, 4, 6, 1)


def inputs(shape=SHAPE):
    return jax.random.normal(jax.random.key(1), shape), jnp.linspace(0.1, 0.9, shape[0])


def shapes_of(model, shape=SHAPE):
    x_t, noise_level = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x_t, noise_level)["params"]


def shaken(params, scale=0.2):
    """Parameters with nothing left at zero, as after some training."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return structure.unflatten([p + scale * rng.normal(size=p.shape).astype(np.float32) for p in leaves])


@functools.cache
def initialised(**options):
    model = ResidualUNet(**TINY | options)
    return model, jax.jit(model.init)(jax.random.key(0), *inputs())["params"]


@functools.partial(jax.jit, static_argnames=("model", "train"))
def forward(model, params, x_t, noise_level, label=None, train=False):
    return model.apply({"params": params}, x_t, noise_level, label, train)


def named(params):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(params)}


# The network


def test_the_output_is_a_float32_image_and_zero_at_the_start():
    model, params = initialised()
    output = forward(model, params, *inputs())
    assert output.dtype == jnp.float32
    np.testing.assert_array_equal(output, np.zeros(SHAPE))
    assert jnp.abs(forward(model, shaken(params), *inputs())).max() > 0.1


def test_the_defaults_are_the_write_ups_network():
    """Widths 32, 64, 96 of depth 2, two blocks of 128, a shortcut where the width changes, all norms bare."""
    params = shapes_of(ResidualUNet(out_channels=3), (1, 64, 64, 3))
    convolutions = {name: x.shape for name, x in named(params).items() if name.endswith("conv_0/kernel")}
    assert {name.removesuffix("/conv_0/kernel"): shape[2:] for name, shape in convolutions.items()} == {
        "down_0_block_0": (32 + 32, 32),
        "down_0_block_1": (32, 32),
        "down_1_block_0": (32, 64),
        "down_1_block_1": (64, 64),
        "down_2_block_0": (64, 96),
        "down_2_block_1": (96, 96),
        "middle_block_0": (96, 128),
        "middle_block_1": (128, 128),
        "up_2_block_0": (128 + 96, 96),
        "up_2_block_1": (96 + 96, 96),
        "up_1_block_0": (96 + 64, 64),
        "up_1_block_1": (64 + 64, 64),
        "up_0_block_0": (64 + 32, 32),
        "up_0_block_1": (32 + 32, 32),
    }
    # Every convolution and bias of the network, counted by hand: no norm has a parameter.
    blocks = [shape[2:] for shape in convolutions.values()]
    sizes = [9 * i * o + o + 9 * o * o + o + (i * o + o if i != o else 0) for i, o in blocks]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == sum(sizes) + (3 * 32 + 32) + (32 * 3 + 3)


def test_three_halvings_take_64_pixels_and_not_36():
    shapes_of(ResidualUNet(out_channels=1, base_channels=4), (1, 64, 32, 1))
    with pytest.raises(ValueError, match=r"^data\.image_size: 36x36 must be divisible by 8"):
        shapes_of(ResidualUNet(out_channels=1, base_channels=4), (1, 36, 36, 1))
    with pytest.raises(ValueError, match=r"^model\.num_groups=3: must divide model\.base_channels=8"):
        shapes_of(ResidualUNet(**TINY, num_groups=3))


def test_the_gradient_reaches_every_parameter():
    model, params = initialised(num_classes=2)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, *inputs(), jnp.array([0, 1])) - inputs()[0]) ** 2)

    grads = jax.jit(jax.grad(loss))(shaken(params))
    assert [name for name, x in named(grads).items() if not jnp.abs(x).max() > 1e-7] == []


def test_every_skip_is_read():
    """Where what comes from the middle is nulled, the way up still sees the image."""
    model, params = initialised()
    params = shaken(params)
    params["middle_block_0"] = jax.tree.map(jnp.zeros_like, params["middle_block_0"])  # its shortcut, too
    x_t, noise_level = inputs()
    moved = forward(model, params, x_t.at[:, 1, 1].add(1.0), noise_level) - forward(model, params, x_t, noise_level)
    assert jnp.abs(moved).max() > 1e-3


def test_training_gives_the_same_output():
    model, params = initialised()
    quiet, train = (forward(model, shaken(params), *inputs(), train=train) for train in (False, True))
    np.testing.assert_allclose(train, quiet, rtol=1e-5, atol=1e-5)


# Noise level and class


def test_it_says_that_it_takes_the_noise_level_and_refuses_a_timestep():
    assert takes_noise_level(ResidualUNet)
    assert takes_noise_level(ResidualUNet(**TINY))
    with pytest.raises(ValueError, match=r"^noise_level: is int32; .* 1 - alpha_bar in \[0, 1\]"):
        jax.eval_shape(ResidualUNet(**TINY).init, jax.random.key(0), inputs()[0], jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("dim", [4, 16, 32])
def test_the_embedding_is_the_write_ups_formula(dim):
    levels = np.array([0.0, 0.0975, 0.31, 0.9996, 1.0])
    frequencies = np.exp(np.linspace(np.log(1.0), np.log(1000.0), dim // 2))
    angles = 2 * np.pi * frequencies * levels.astype(np.float32).astype(np.float64)[:, None]
    found = noise_embedding(jnp.asarray(levels, jnp.float32), dim)
    assert found.dtype == jnp.float32
    # A float32 angle of 2 pi 1000 is known to 5e-4.
    np.testing.assert_allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-3)


def test_an_odd_embedding_ends_in_a_zero():
    found = noise_embedding(jnp.array([0.3]), 7)
    np.testing.assert_array_equal(found[:, 6], 0)
    np.testing.assert_array_equal(found[:, :6], noise_embedding(jnp.array([0.3]), 6))


def test_the_noise_level_and_the_label_of_each_example():
    """Norms that took the mean of each channel over the image would not let the noise level through."""
    model, params = initialised(num_classes=2)
    x_t = jnp.broadcast_to(inputs()[0][:1], (6, *SHAPE[1:]))
    run = functools.partial(forward, model, shaken(params), x_t)
    found = run(jnp.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.6]), jnp.array([0, 1, 2, 1, 0, 0]))
    np.testing.assert_allclose(found[4], found[0], atol=1e-5)
    for one, two in itertools.combinations([0, 1, 2, 5], 2):
        assert jnp.abs(found[one] - found[two]).max() > 1e-3
    np.testing.assert_allclose(run(jnp.full(6, 0.5)), jnp.broadcast_to(found[2], x_t.shape), atol=1e-5)


def test_a_picture_does_not_depend_on_the_others_of_its_batch():
    model, params = initialised()
    x_t, noise_level = inputs((3, *SHAPE[1:]))
    alone = forward(model, shaken(params), x_t[:1], noise_level[:1])
    np.testing.assert_allclose(forward(model, shaken(params), x_t, noise_level)[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_label_needs_classes():
    with pytest.raises(ValueError, match=r"^model\.num_classes=0: .*takes no label"):
        jax.eval_shape(ResidualUNet(**TINY).init, jax.random.key(0), *inputs(), jnp.array([0, 1]))


# Beside PyTorch: the same formulas, written with its layers


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def as_torch(torch, x):
    """An image [B H W C] -> [B C H W], in float64."""
    return torch.tensor(np.asarray(x, np.float64).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 1, 1, 3), (1, 8, 2, 1)])
def test_upsampling_is_torchs_bilinear_one(torch, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    expected = torch.nn.functional.interpolate(as_torch(torch, x), scale_factor=2, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(upsample(x), expected.permute(0, 2, 3, 1), atol=1e-6)


def test_upsampling_is_jaxs_bilinear_one():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    np.testing.assert_allclose(upsample(x), jax.image.resize(x, (2, 10, 6, 4), "bilinear"), atol=1e-6)


def test_downsampling_is_torchs_average_pool(torch):
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    expected = torch.nn.functional.avg_pool2d(as_torch(torch, x), 2).permute(0, 2, 3, 1)
    np.testing.assert_allclose(downsample(x), expected, atol=1e-6)


@pytest.mark.parametrize("width", [16, 24])  # to 24: with and without a projection on the shortcut
def test_the_residual_block_in_torch(torch, width):
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, width)) + 3  # off centre, so that the norm has something to do
    module = ResidualBlock(24, num_groups=4, dtype=jnp.float32)
    params = shaken(module.init(jax.random.key(1), x)["params"], 0.3)
    f = torch.nn.functional
    own = {name: torch.tensor(np.asarray(p, np.float64)) for name, p in named(params).items()}

    def conv(h, name):
        kernel = own[f"{name}/kernel"]
        weight = kernel.T[:, :, None, None] if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1)
        return f.conv2d(h, weight, own[f"{name}/bias"], padding=weight.shape[-1] // 2)

    theirs = as_torch(torch, x)
    h = conv(f.silu(conv(f.group_norm(theirs, 4, eps=1e-6), "conv_0")), "conv_1")
    expected = (h + (conv(theirs, "shortcut") if width != 24 else theirs)).permute(0, 2, 3, 1).numpy()
    found = np.asarray(module.apply({"params": params}, x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# bfloat16, rematerialisation


def test_bfloat16_computes_with_float32_parameters():
    options = {"base_channels": 32}
    model, params = initialised(**options)
    low = ResidualUNet(**TINY | options, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(shapes_of(low))} == {jnp.dtype(jnp.float32)}
    expected, found = (forward(m, shaken(params, 0.05), *inputs()) for m in (model, low))
    assert found.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((found - expected) ** 2) / jnp.mean(expected**2))
    assert 1e-4 < error < 0.03  # eight bits; and it is not float32 after all


@pytest.mark.parametrize("remat", ["dots", "blocks"])
def test_remat_changes_neither_the_parameters_nor_the_gradient(remat):
    _, params = initialised()

    def gradient(remat):
        model = ResidualUNet(**TINY, remat=remat)
        assert jax.tree.structure(shapes_of(model)) == jax.tree.structure(params)
        return jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, *inputs(), train=True) ** 2)))

    plain, again = (gradient(name)(shaken(params)) for name in ("none", remat))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), again, plain)
