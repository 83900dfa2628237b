import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ddpm_jax.models import LinearAttentionUNet
from ddpm_jax.models.layers import GroupNorm
from ddpm_jax.models.linear_attention_unet import (
    ConvNextBlock,
    FullAttention,
    LinearAttention,
    ResnetBlock,
    linear_attention,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"out_channels": 1, "base_channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "num_heads": 1}
SHAPE = (2, 4, 6, 1)
both_blocks = pytest.mark.parametrize("block", ["convnext", "resnet"])


def inputs(shape=SHAPE):
    return jax.random.normal(jax.random.key(1), shape), jnp.arange(shape[0]) * 100 + 7


def shapes_of(model, shape=SHAPE):
    x_t, t = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x_t, t)["params"]


def shaken(params, scale=0.2):
    """Parameters with nothing left at zero, as after some training."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return structure.unflatten([p + scale * rng.normal(size=p.shape).astype(np.float32) for p in leaves])


@functools.cache
def initialised(**options):
    model = LinearAttentionUNet(**TINY | options)
    return model, jax.jit(model.init)(jax.random.key(0), *inputs())["params"]


@functools.partial(jax.jit, static_argnames=("model", "train"))
def forward(model, params, x_t, t, label=None, train=False, dropout_key=None):
    return model.apply({"params": params}, x_t, t, label, train, rngs={"dropout": dropout_key} if train else {})


def named(params):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(params)}


# The network


@both_blocks
def test_the_output_is_a_float32_image_and_zero_at_the_start(block):
    model, params = initialised(block=block)
    output = forward(model, params, *inputs())
    assert output.dtype == jnp.float32
    np.testing.assert_array_equal(output, np.zeros(SHAPE))
    assert jnp.abs(forward(model, shaken(params), *inputs())).max() > 0.1


@both_blocks
def test_every_level_has_its_blocks_linear_attention_and_skip(block):
    params = shapes_of(LinearAttentionUNet(out_channels=1, block=block), (1, 28, 28, 1))
    assert params["conv_in"]["kernel"].shape == (7, 7, 1, 32)
    attending = {name for name in params if "attention" in name}
    assert attending == {f"{way}_{level}_attention" for way in ("down", "up") for level in range(3)} | {
        "middle_attention"
    }
    assert all(params[name]["query"]["kernel"].shape[1] == 4 * 32 for name in attending)
    blocks = {name: x["conv_0"]["kernel"].shape for name, x in params.items() if "block" in name}
    assert len(blocks) == 2 * 2 * 3 + 2
    # On the way up each first block reads what came from below, as wide as its own level was made there, and the skip.
    into = {level: params[f"up_{level}_block_0"]["shortcut"]["kernel"].shape for level in range(3)}
    assert into == {2: (128 + 128, 64), 1: (64 + 64, 32), 0: (32 + 32, 32)}


def test_three_levels_take_28_pixels_and_four_do_not():
    model = functools.partial(LinearAttentionUNet, **TINY | {"channel_mults": (1, 1, 1)})
    output = jax.eval_shape(
        lambda: model().init_with_output(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), jnp.zeros((1,), jnp.int32))[0]
    )
    assert output.shape == (1, 28, 28, 1)
    with pytest.raises(ValueError, match=r"^data\.image_size: 28x28 must be divisible by 8, since .* 3 times"):
        shapes_of(model(channel_mults=(1, 1, 1, 1)), (1, 28, 28, 1))
    with pytest.raises(ValueError, match=r"^model\.block='swin': choose one of convnext, resnet"):
        shapes_of(model(block="swin"), (1, 28, 28, 1))
    with pytest.raises(ValueError, match=r"^model\.num_groups=3: must divide model\.base_channels=8"):
        shapes_of(model(num_groups=3), (1, 28, 28, 1))


@both_blocks
def test_the_gradient_reaches_every_parameter(block):
    model, params = initialised(block=block, num_classes=2)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, *inputs(), jnp.array([0, 1])) - inputs()[0]) ** 2)

    grads = jax.jit(jax.grad(loss))(shaken(params))
    assert [name for name, x in named(grads).items() if not jnp.abs(x).max() > 1e-7] == []


@both_blocks
def test_every_skip_is_read(block):
    """Where all that comes from below is nulled, the first level's own blocks still see the image."""
    model, params = initialised(block=block)
    params = shaken(params)
    params["up_1_upsample"] = jax.tree.map(jnp.zeros_like, params["up_1_upsample"])
    x_t, t = inputs()
    moved = forward(model, params, x_t.at[:, 1, 1].add(1.0), t)
    assert jnp.abs(moved - forward(model, params, x_t, t)).max() > 1e-2


# Time and class


@both_blocks
def test_time_and_label_of_each_example(block):
    """Also in layers as narrow as these, where groups of one channel would take them away again."""
    model, params = initialised(block=block, num_classes=2)
    x_t = jnp.broadcast_to(inputs()[0][:1], (6, *SHAPE[1:]))
    run = functools.partial(forward, model, shaken(params, 0.1), x_t)  # outputs below ten
    found = run(jnp.array([10, 10, 10, 10, 10, 11]), jnp.array([0, 1, 2, 1, 0, 0]))
    np.testing.assert_allclose(found[4], found[0], atol=1e-5)
    for one, two in itertools.combinations([0, 1, 2, 5], 2):
        assert jnp.abs(found[one] - found[two]).max() > 1e-3
    np.testing.assert_allclose(run(jnp.full(6, 10)), jnp.broadcast_to(found[2], x_t.shape), atol=1e-5)


def test_a_label_needs_classes():
    with pytest.raises(ValueError, match=r"^model\.num_classes=0: .*takes no label"):
        jax.eval_shape(LinearAttentionUNet(**TINY).init, jax.random.key(0), *inputs(), jnp.array([0, 1]))


# Attention


def test_linear_attention_against_its_full_matrix():
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 15, 3, 8))
    expected = np.zeros_like(value)
    for b, h in np.ndindex(2, 3):
        q, k = np.exp(query[b, :, h]), np.exp(key[b, :, h])
        weights = (q / q.sum(1, keepdims=True)) @ (k / k.sum(0)).T / math.sqrt(8)  # [15 15]
        expected[b, :, h] = weights @ value[b, :, h]
    found = linear_attention(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_linear_attention_is_float32_in_bfloat16():
    x = jnp.zeros((1, 4, 1, 8), jnp.bfloat16)
    equations = jax.make_jaxpr(linear_attention)(x, x, x).jaxpr.eqns
    names = ("exp", "reduce_sum", "dot_general")
    found = [(e.primitive.name, e.outvars[0].aval.dtype) for e in equations if e.primitive.name in names]
    assert {name for name, _ in found} >= {"exp", "dot_general"}
    assert {dtype for _, dtype in found} == {jnp.dtype(jnp.float32)}


# Beside PyTorch: the same formulas, written with its layers


def as_torch(x):
    """An image [B H W C] -> [B C H W], in float64."""
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(x, np.float64).transpose(0, 3, 1, 2))


class Torch:
    """The layers of PyTorch, functional, in float64, with our parameters."""

    def __init__(self, params):
        self.torch = pytest.importorskip("torch")
        self.f = self.torch.nn.functional
        self.params = {k: self.torch.tensor(np.asarray(x, np.float64)) for k, x in named(params).items()}

    def has(self, name):
        return f"{name}/kernel" in self.params

    def conv(self, x, name, groups=1):
        kernel = self.params[f"{name}/kernel"]
        bias = self.params.get(f"{name}/bias")
        weight = kernel.T[:, :, None, None] if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1)
        return self.f.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups)

    def linear(self, x, name):
        return x @ self.params[f"{name}/kernel"] + self.params[f"{name}/bias"]

    def norm(self, x, name, groups):
        return self.f.group_norm(x, groups, self.params[f"{name}/scale"], self.params[f"{name}/bias"], 1e-6)

    def shortcut(self, x):
        return self.conv(x, "shortcut") if self.has("shortcut") else x


def check_beside_torch(module, theirs, width, *arguments):
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, width))
    params = shaken(module.init(jax.random.key(1), x, *arguments)["params"], 0.3)
    expected = theirs(Torch(params), as_torch(x)).permute(0, 2, 3, 1).numpy()
    found = np.asarray(module.apply({"params": params}, x, *arguments))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


NORM = functools.partial(GroupNorm, 4)
EMBEDDING = np.random.default_rng(2).normal(size=(2, 12)).astype(np.float32)


@pytest.mark.parametrize("width", [16, 24])  # to 24: with and without a projection on the shortcut
def test_the_convnext_block_in_torch(width):
    def theirs(torch, x):
        gelu, embedding = torch.f.gelu, torch.torch.tensor(EMBEDDING.astype(np.float64))
        h = torch.conv(x, "depthwise", groups=width) + torch.linear(gelu(embedding), "time_dense")[:, :, None, None]
        h = gelu(torch.conv(torch.norm(h, "norm_0", 4), "conv_0"))
        assert h.shape[1] == 2 * 24
        return torch.conv(torch.norm(h, "norm_1", 4), "conv_1") + torch.shortcut(x)

    module = ConvNextBlock(24, mult=2, norm=NORM, dropout=0.0, dtype=jnp.float32)
    check_beside_torch(module, theirs, width, jnp.asarray(EMBEDDING), False)


@pytest.mark.parametrize("width", [16, 24])
def test_the_resnet_block_in_torch(width):
    def theirs(torch, x):
        silu, embedding = torch.f.silu, torch.torch.tensor(EMBEDDING.astype(np.float64))
        time = torch.linear(silu(embedding), "time_dense")[:, :, None, None]
        scale, shift = time.chunk(2, dim=1)
        h = silu(torch.norm(torch.conv(x, "conv_0"), "norm_0", 4) * (scale + 1) + shift)
        return silu(torch.norm(torch.conv(h, "conv_1"), "norm_1", 4)) + torch.shortcut(x)

    module = ResnetBlock(24, norm=NORM, dropout=0.0, dtype=jnp.float32)
    check_beside_torch(module, theirs, width, jnp.asarray(EMBEDDING), False)


def heads(torch, x):
    """Query, key and value, each [B heads 32 N], of the normed image."""
    x = torch.norm(x, "norm", 1)
    return (torch.conv(x, name).reshape(x.shape[0], 2, 32, -1) for name in ("query", "key", "value"))


def test_linear_attention_with_its_norms_in_torch():
    def theirs(torch, x):
        query, key, value = heads(torch, x)
        context = torch.torch.einsum("bhdn,bhen->bhde", key.softmax(-1), value)
        h = torch.torch.einsum("bhde,bhdn->bhen", context, query.softmax(-2) / 32**0.5)
        h = torch.conv(h.reshape(x.shape[0], 64, *x.shape[2:]), "projection")
        return torch.norm(h, "norm_out", 1) + x

    check_beside_torch(LinearAttention(2, jnp.float32), theirs, 12)


def test_full_attention_with_its_norm_in_torch():
    def theirs(torch, x):
        query, key, value = (y.transpose(2, 3) for y in heads(torch, x))
        h = torch.f.scaled_dot_product_attention(query, key, value).transpose(2, 3)
        return torch.conv(h.reshape(x.shape[0], 64, *x.shape[2:]), "projection") + x

    check_beside_torch(FullAttention(2, jnp.float32), theirs, 12)


# Dropout, bfloat16, rematerialisation


@both_blocks
def test_dropout_is_active_in_training_only(block):
    model, params = initialised(block=block, dropout=0.5)
    run = functools.partial(forward, model, shaken(params), *inputs())
    quiet, one, two = run(), *(run(train=True, dropout_key=jax.random.key(seed)) for seed in range(2))
    np.testing.assert_array_equal(quiet, forward(LinearAttentionUNet(**TINY, block=block), shaken(params), *inputs()))
    np.testing.assert_array_equal(one, run(train=True, dropout_key=jax.random.key(0)))
    assert min(jnp.abs(a - b).max() for a, b in itertools.combinations((quiet, one, two), 2)) > 1e-2


@both_blocks
def test_bfloat16_computes_with_float32_parameters(block):
    options = {"block": block, "base_channels": 32}
    model, params = initialised(**options)
    low = LinearAttentionUNet(**TINY | options, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(shapes_of(low))} == {jnp.dtype(jnp.float32)}
    expected, found = (forward(m, shaken(params, 0.05), *inputs()) for m in (model, low))
    assert found.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((found - expected) ** 2) / jnp.mean(expected**2))
    assert 1e-4 < error < 0.03  # eight bits; and it is not float32 after all


@pytest.mark.parametrize(("block", "remat"), [("convnext", "dots"), ("resnet", "blocks")])
def test_remat_changes_neither_the_parameters_nor_the_gradient(block, remat):
    _, params = initialised(block=block)

    def gradient(remat):
        model = LinearAttentionUNet(**TINY, block=block, dropout=0.3, remat=remat)
        rngs = {"dropout": jax.random.key(2)}
        assert jax.tree.structure(shapes_of(model)) == jax.tree.structure(params)
        return jax.grad(lambda p: jnp.mean(model.apply({"params": p}, *inputs(), train=True, rngs=rngs) ** 2))

    plain, again = (jax.jit(gradient(remat))(shaken(params)) for remat in ("none", remat))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), again, plain)
    count = functools.partial(_count, "conv_general_dilated")
    more = count(gradient(remat), params) - count(gradient("none"), params)
    assert more == 0 if remat == "dots" else more >= 6


def _count(name, f, *arguments):
    def names(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for sub in jaxprs_in_params(equation.params):
                yield from names(sub)

    return list(names(jax.make_jaxpr(f)(*arguments).jaxpr)).count(name)
