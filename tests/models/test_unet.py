import functools
import itertools
import math
import re
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ddpm_jax.models import UNet, check_attention, unet
from ddpm_jax.models.layers import GroupNorm
from ddpm_jax.models.unet import AttentionBlock, ResBlock

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {
    "out_channels": 3,
    "base_channels": 8,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
}
NORM = functools.partial(GroupNorm, num_groups=8)
ONE_LEVEL = TINY | {"channel_mults": (1,)}  # where the levels do not matter: half as long to compile
SHAPE = (2, 8, 8, 3)


@functools.cache
def initialised(shape=SHAPE, **options):
    model = UNet(**{**TINY, "out_channels": shape[-1], **options})
    t = jnp.zeros(shape[:1], jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape), t)["params"]


def shapes_of(model, shape=SHAPE):
    x_t, t = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x_t, t)["params"]


def shaken(params, scale=0.2):
    """Parameters with nothing left at zero, as after some training."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return structure.unflatten([p + scale * rng.normal(size=p.shape).astype(np.float32) for p in leaves])


def inputs(shape=SHAPE):
    return jax.random.normal(jax.random.key(1), shape), jnp.arange(shape[0]) * 300 + 7


@functools.partial(jax.jit, static_argnames=("model", "train"))
def forward(model, params, x_t, t, label=None, train=False, dropout_key=None):
    return model.apply({"params": params}, x_t, t, label, train, rngs={"dropout": dropout_key} if train else {})


def named(params):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(params)}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for sub in jaxprs_in_params(equation.params):
            yield from equations(sub)


def is_of_a_norm(equation):
    """One of the small products that take channels to groups and back: they alone ask for a precision."""
    return equation.primitive.name == "dot_general" and equation.params["precision"] is not None


# The shape of the network


def test_the_cifar10_network_has_the_parameters_of_ho_et_al():  # 35.7 M there; exact: google/ddpm-cifar10-32
    params = shapes_of(UNet(out_channels=3), (1, 32, 32, 3))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 35_746_307
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("resolutions", "shape", "attended"),
    [
        pytest.param((), (1, 16, 16, 3), [], id="none"),
        pytest.param((8,), (1, 16, 16, 3), [1], id="second level"),
        pytest.param((16, 4), (1, 16, 16, 3), [0, 2], id="two levels"),
        pytest.param((8,), (1, 8, 16, 3), [0], id="the height counts"),
        pytest.param((8,), (1, 16, 8, 3), [1], id="and not the width"),
        pytest.param((5,), (1, 16, 16, 3), [], id="no such level"),
    ],
)
def test_attention_at_the_listed_heights_and_always_in_the_middle(resolutions, shape, attended):
    options = {"channel_mults": (1, 2, 2), "num_res_blocks": 2, "attention_resolutions": resolutions}
    found = {name for name in shapes_of(UNet(**TINY | options), shape) if "attention" in name}
    down = {f"down_{level}_attention_{i}" for level in attended for i in range(2)}
    up = {f"up_{level}_attention_{i}" for level in attended for i in range(3)}
    assert found == down | up | {"middle_attention"}


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 6, 4, 1)], ids=lambda shape: "x".join(map(str, shape)))
def test_the_output_is_a_float32_image_and_zero_at_the_start(shape):
    model, params = initialised(shape, attention_resolutions=(4,), num_classes=2)
    output = forward(model, params, *inputs(shape))
    assert output.dtype == jnp.float32
    np.testing.assert_array_equal(output, np.zeros(shape))
    assert jnp.abs(forward(model, shaken(params), *inputs(shape))).max() > 0.1


@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 6), (7, 7), (2, 2)])
def test_a_size_that_cannot_be_halved_is_refused(height, width):
    model = UNet(**TINY | {"channel_mults": (1, 1, 1)})
    with pytest.raises(ValueError, match=rf"^data\.image_size: {height}x{width} must be divisible by 4.*halves.* 2 "):
        shapes_of(model, (1, height, width, 3))


def test_what_starts_at_zero():
    _, params = initialised(attention_resolutions=(4,), num_classes=2)
    kernels = {name: x for name, x in named(params).items() if name.endswith("kernel")}
    zero = {name for name, x in kernels.items() if not np.any(x)}
    ends = {name for name in kernels if name.endswith(("conv_1/kernel", "projection/kernel"))} | {"conv_out/kernel"}
    assert zero == ends
    assert len(zero) == (1 + 2) * 2 + 2 + (1 + 2 + 1) + 1  # blocks of the levels and of the middle, attention, the end
    others = {name: x for name, x in named(params).items() if not name.endswith(("kernel", "embedding"))}
    assert all((x == name.endswith("scale")).all() for name, x in others.items())  # norms are the identity, biases 0


def test_group_norm_against_float64():
    """Of the network's last norm, which silu and the last convolution follow."""
    model, params = initialised(**ONE_LEVEL)
    x_t, t = inputs()
    _, seen = model.apply({"params": shaken(params)}, x_t, t, capture_intermediates=True)
    h = np.asarray(seen["intermediates"]["up_0_block_1"]["__call__"][0], np.float64)
    groups = h.reshape(2, 64, 2, 4)  # eight channels: two groups of four
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    p = shaken(params)["norm_out"]
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(h.shape) * p["scale"] + p["bias"]
    np.testing.assert_allclose(seen["intermediates"]["norm_out"]["__call__"][0], expected, atol=1e-4)


def test_number_of_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"model.num_groups=3: must divide model.base_channels=8"):
        initialised(num_groups=3)


def test_width_of_a_head_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"model.attention_head_channels=3: must divide the channels of every level"):
        initialised(attention_head_channels=3)


# Time and class


def test_time_and_label_of_each_example():
    options = ONE_LEVEL | {"base_channels": 64, "num_classes": 3}
    model = UNet(**options)
    shape = (6, *SHAPE[1:])
    params = shaken(jax.jit(model.init)(jax.random.key(0), *inputs(shape))["params"])
    x_t = jnp.broadcast_to(inputs()[0][:1], shape)
    found = forward(model, params, x_t, jnp.array([10, 10, 10, 10, 10, 11]), jnp.array([0, 1, 2, 3, 0, 0]))
    np.testing.assert_allclose(found[4], found[0], atol=1e-5)
    for one, two in itertools.combinations([0, 1, 2, 3, 5], 2):
        assert jnp.abs(found[one] - found[two]).max() > 1e-3
    unlabelled = forward(model, params, x_t, jnp.full(6, 10))  # label 3 of 0, 1, 2 is none
    np.testing.assert_allclose(unlabelled, jnp.broadcast_to(found[3], shape), atol=1e-5)


def test_a_label_needs_classes():
    with pytest.raises(ValueError, match=r"^model\.num_classes=0: .*takes no label"):
        jax.eval_shape(UNet(**TINY).init, jax.random.key(0), *inputs(), jnp.array([0, 1]))


# Dropout


def test_dropout_is_active_in_training_only():
    model = UNet(**ONE_LEVEL, dropout=0.5)
    params = shaken(initialised(channel_mults=(1,))[1])
    run = functools.partial(forward, model, params, *inputs())
    keys = [jax.random.key(seed) for seed in range(2)]
    quiet, one, two = run(), run(train=True, dropout_key=keys[0]), run(train=True, dropout_key=keys[1])
    np.testing.assert_array_equal(quiet, forward(UNet(**ONE_LEVEL), params, *inputs()))
    np.testing.assert_array_equal(one, run(train=True, dropout_key=keys[0]))
    assert min(jnp.abs(a - b).max() for a, b in itertools.combinations((quiet, one, two), 2)) > 1e-2
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(functools.partial(model.apply, train=True), {"params": params}, *inputs())


def test_dropout_comes_right_before_the_second_convolution():
    rate, channels = 0.25, 16
    block = ResBlock(channels, NORM, rate, time_scale_shift=False, dtype=jnp.float32)
    x, embedding = jax.random.normal(jax.random.key(0), (4, 8, 8, channels)), jnp.ones((4, 8))
    params = shaken(block.init(jax.random.key(0), x, embedding, False)["params"])
    identity = np.zeros((3, 3, channels, channels), np.float32)
    identity[1, 1] = np.eye(channels)
    params["conv_1"] = {"kernel": jnp.asarray(identity), "bias": jnp.zeros(channels)}
    run = functools.partial(block.apply, {"params": params}, x, embedding)
    branch = run(False) - x
    dropped = run(True, rngs={"dropout": jax.random.key(1)}) - x
    ratio = np.asarray(dropped / branch)[np.abs(branch) > 1e-2]  # through norm or silu it would be neither 0 nor 4/3
    lost = np.abs(ratio) < 1e-3
    np.testing.assert_allclose(ratio[~lost], 1 / (1 - rate), rtol=1e-3)
    assert abs(lost.mean() - rate) < 0.03


# bfloat16


def test_bfloat16_computes_with_float32_parameters():
    model, low = (UNet(**ONE_LEVEL | {"base_channels": 64, "dtype": dtype}) for dtype in (jnp.float32, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(shapes_of(low))} == {jnp.dtype(jnp.float32)}
    params = jax.jit(model.init)(jax.random.key(0), *inputs())["params"]
    params = shaken(params, 0.05)
    expected, found = (forward(m, params, *inputs()) for m in (model, low))
    assert found.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((found - expected) ** 2) / jnp.mean(expected**2))
    assert 1e-4 < error < 0.03  # eight bits, some twenty layers; and it is not float32 after all


def test_bfloat16_is_for_products_and_float32_for_statistics():
    model = UNet(**TINY | {"dtype": jnp.bfloat16, "attention_resolutions": (4,)})
    jaxpr = jax.make_jaxpr(model.apply)({"params": shapes_of(model)}, *inputs())
    seen = {}
    for equation in equations(jaxpr.jaxpr):
        if equation.invars and not is_of_a_norm(equation):
            seen.setdefault(equation.primitive.name, set()).add(str(equation.invars[0].aval.dtype))
    assert seen["dot_general"] == {"bfloat16"}
    assert seen["conv_general_dilated"] == {"bfloat16", "float32"}
    convolutions = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "conv_general_dilated"]
    # The last one alone, as a CPU computes it and as others do.
    assert [e.invars[0].aval.dtype == jnp.float32 for e in convolutions] == [False] * (len(convolutions) - 2) + [
        True
    ] * 2
    assert seen["reduce_sum"] == seen["exp"] == seen["rsqrt"] == seen["sin"] == {"float32"}


def test_attention_logits_and_softmax_are_float32_in_bfloat16():
    block = AttentionBlock(NORM, None, "xla", jnp.bfloat16)
    x = jnp.zeros((1, 4, 4, 32), jnp.bfloat16)
    params = jax.eval_shape(block.init, jax.random.key(0), x)
    found = list(equations(jax.make_jaxpr(block.apply)(params, x).jaxpr))
    products = [e for e in found if e.primitive.name == "dot_general"]
    logits = [e for e in products if math.prod(e.outvars[0].aval.shape) == 16 * 16]
    assert {e.invars[0].aval.dtype for e in logits} == {jnp.dtype(jnp.bfloat16)}
    assert {e.outvars[0].aval.dtype for e in logits} == {jnp.dtype(jnp.float32)}
    exponentials = [e.invars[0].aval.dtype for e in found if e.primitive.name == "exp"]
    assert exponentials == [jnp.float32] * len(logits) == [jnp.float32] * 2  # on a CPU and elsewhere


def test_the_attention_of_a_cpu_is_that_of_jax():
    """One head: values and gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, g = (jax.random.normal(k, (3, 20, 1, 16)) for k in keys)
    found, back = jax.vjp(unet._one_head_attention, query, key, value)
    expected, expected_back = jax.vjp(jax.nn.dot_product_attention, query, key, value)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for one, other in zip(back(g), expected_back(g), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_attention_in_bfloat16_where_bfloat16_logits_would_be_wrong():
    # Pixels come in pairs that are nearly alike, with logits near 400, where bfloat16 knows even numbers only. Query,
    # key and value are scaled identities, so that nothing but logits, softmax and its product rounds.
    channels, pixels = 64, 16
    rng = np.random.default_rng(0)
    x = rng.normal(size=(pixels // 2, 1, channels))
    x = (x + 0.1 * rng.normal(size=(pixels // 2, 2, channels))).reshape(1, 4, 4, channels)
    x = jnp.asarray(x, jnp.bfloat16)
    eye, scales = np.eye(channels, dtype=np.float32), {"query": 32.0, "key": 1.0, "value": 1.0, "projection": 1.0}
    params = {name: {"kernel": scale * eye, "bias": np.zeros(channels)} for name, scale in scales.items()}
    params["norm"] = {"scale": np.ones(channels), "bias": np.zeros(channels)}
    norm = functools.partial(NORM, num_groups=32)
    block = AttentionBlock(norm, None, "xla", jnp.bfloat16)
    found = np.asarray(block.apply({"params": params}, x), np.float64)

    h = norm(dtype=jnp.bfloat16).apply({"params": params["norm"]}, x)
    h = np.asarray(h, np.float64).reshape(pixels, channels)
    logits = 32 * h @ h.T / math.sqrt(channels)

    def attend(logits):
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(x, np.float64) + (weights / weights.sum(-1, keepdims=True) @ h).reshape(x.shape)

    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    assert np.abs(attend(rounded) - attend(logits)).max() > 0.1
    np.testing.assert_allclose(found, attend(logits), atol=0.03, rtol=0.01)


def test_attention_is_one_head_over_the_pixels():
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 8))
    block = AttentionBlock(functools.partial(NORM, num_groups=2), None, "xla", jnp.float32)
    params = shaken(block.init(jax.random.key(0), x)["params"], 0.5)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    h = np.asarray(x, np.float64)
    groups = h.reshape(2, 6, 2, 4)
    h = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    h = h.reshape(2, 6, 8) * p["norm"]["scale"] + p["norm"]["bias"]
    query, key, value = (h @ p[name]["kernel"] + p[name]["bias"] for name in ("query", "key", "value"))
    weights = np.exp(query @ key.transpose(0, 2, 1) / math.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    expected = x + ((weights @ value) @ p["projection"]["kernel"] + p["projection"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


# Rematerialisation


@functools.cache
def loss_and_gradient(remat):
    f, params = gradient(remat)
    return jax.jit(f)(params)


def gradient(remat):
    params = initialised(channel_mults=(1,))[1]
    model = UNet(**ONE_LEVEL, dropout=0.3, remat=remat)

    def loss(params):
        rngs = {"dropout": jax.random.key(2)}
        return jnp.mean(model.apply({"params": params}, *inputs(), train=True, rngs=rngs) ** 2)

    return jax.value_and_grad(loss), shaken(params)


@pytest.mark.parametrize("remat", ["blocks", "dots"])
def test_remat_changes_neither_loss_nor_gradient(remat):
    (loss, grads), (remat_loss, remat_grads) = loss_and_gradient("none"), loss_and_gradient(remat)
    np.testing.assert_allclose(remat_loss, loss, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), remat_grads, grads)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_remat_computes_again_what_it_says(platform):
    def counts(remat):
        f, params = gradient(remat)
        program = jax.jit(f).trace(params).lower(lowering_platforms=(platform,)).as_text()
        names = ("convolution", "dot_general", "exponential")
        return {name: len(re.findall(rf"stablehlo\.{name}\b", program)) for name in names}

    none, blocks, dots = (counts(remat) for remat in ("none", "blocks", "dots"))
    num_blocks, num_attentions = 1 + 2 + 2, 1
    assert blocks["convolution"] - none["convolution"] >= num_blocks
    assert blocks["dot_general"] - none["dot_general"] >= 2 * num_attentions
    for name in ("convolution", "dot_general"):
        assert dots[name] == none[name] > 0
    assert dots["exponential"] > none["exponential"]


def test_a_cpu_computes_activations_again_and_no_convolution():
    f, params = gradient("none")
    cpu, tpu = (jax.jit(f).trace(params).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu"))
    assert cpu.count("stablehlo.convolution(") == tpu.count("stablehlo.convolution(") > 0
    assert cpu.count("stablehlo.exponential ") > tpu.count("stablehlo.exponential ")


@pytest.mark.parametrize("remat", ["blocks", "dots"])
def test_remat_keeps_the_names_of_the_parameters(remat):
    assert jax.tree.structure(shapes_of(UNet(**TINY))) == jax.tree.structure(shapes_of(UNet(**TINY, remat=remat)))


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match=r"^train\.remat='all': choose one of none, blocks, dots"):
        shapes_of(UNet(**TINY, remat="all"))


# Attention implementations


def device(kind):
    """What `check_attention` reads of a jax.Device."""
    if kind in ("gpu", "hopper"):
        capability = {"gpu": "8.0", "hopper": "9.0"}[kind]
        return SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    return SimpleNamespace(platform=kind, device_kind=kind)


@pytest.mark.parametrize(
    ("implementation", "width", "dtype", "platform", "message"),
    [
        ("flash", 64, "bfloat16", "gpu", r"^model\.attention='flash': choose one of xla, cudnn$"),
        ("cudnn", 64, "bfloat16", "cpu", r"^model\.attention='cudnn': .*this is cpu; use 'xla'$"),
        ("cudnn", 64, "bfloat16", "tpu", "this is tpu"),
        ("cudnn", 64, "float32", "gpu", "bfloat16, and dtype=float32"),
        ("cudnn", 60, "bfloat16", "gpu", "one here is 60"),
        ("cudnn", 512, "bfloat16", "hopper", "to 256 on a hopper, and one here is 512"),
        ("cudnn", 256, "bfloat16", "gpu", "to 128 on a gpu, and one here is 256"),
    ],
)
def test_an_attention_that_cannot_run_is_refused(implementation, width, dtype, platform, message):
    with pytest.raises(ValueError, match=message):
        check_attention(implementation, [64, width], dtype, device(platform))


def test_an_attention_that_can_run_is_not():
    check_attention("xla", [60], "float32", device("cpu"))
    check_attention("xla", [1024], jnp.float32, device("tpu"))
    check_attention("cudnn", [64, 128], jnp.bfloat16, device("gpu"))
    check_attention("cudnn", [256], "bfloat16", device("hopper"))
