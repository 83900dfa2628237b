"""Files of Ho et al.'s TensorFlow variables, written here from our own weights by the names that their code gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.interop import InteropError
from ddpm_jax.interop.ddpm import load_ddpm
from ddpm_jax.models import UNet

MODEL = UNet(out_channels=3, base_channels=8, channel_mults=(1, 2, 2), num_res_blocks=2, attention_resolutions=(8,))
EMA = "/ExponentialMovingAverage"


def random_params(seed):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros(1, jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def norm(p):
    return {"gamma": p["scale"], "beta": p["bias"]}


def layer(p):
    return {"W": p["kernel"], "b": p["bias"]}


def res_block(p):
    parts = {"norm1": norm(p["norm_0"]), "conv1": layer(p["conv_0"]), "temb_proj": layer(p["time_dense"])}
    parts |= {"norm2": norm(p["norm_1"]), "conv2": layer(p["conv_1"])}
    return parts | ({"nin_shortcut": layer(p["shortcut"])} if "shortcut" in p else {})


def attention(p):
    names = {"q": "query", "k": "key", "v": "value", "proj_out": "projection"}
    return {"norm": norm(p["norm"])} | {theirs: layer(p[ours]) for theirs, ours in names.items()}


def as_ho_et_al(p):
    """Their model, scope by scope; three levels, two blocks each, attention on the second."""
    tree = {
        "temb": {"dense0": layer(p["time_dense_0"]), "dense1": layer(p["time_dense_1"])},
        "conv_in": layer(p["conv_in"]),
        "norm_out": norm(p["norm_out"]),
        "conv_out": layer(p["conv_out"]),
        "mid": {
            "block_1": res_block(p["middle_block_0"]),
            "attn_1": attention(p["middle_attention"]),
            "block_2": res_block(p["middle_block_1"]),
        },
    }
    for level in range(3):
        for way, blocks in (("down", 2), ("up", 3)):
            scope = tree[f"{way}_{level}"] = {}
            for i in range(blocks):
                scope[f"block_{i}"] = res_block(p[f"{way}_{level}_block_{i}"])
                if level == 1:
                    scope[f"attn_{i}"] = attention(p[f"{way}_{level}_attention_{i}"])
        if level < 2:
            tree[f"down_{level}"]["downsample"] = {"conv": layer(p[f"down_{level}_downsample"])}
        if level > 0:
            tree[f"up_{level}"]["upsample"] = {"conv": layer(p[f"up_{level}_upsample"])}
    return tree


def flat(tree, prefix):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: x for key, value in tree.items() for name, x in flat(value, f"{prefix}/{key}").items()}


PARAMS, AVERAGES = random_params(0), random_params(1)


def variables():
    raw, averages = flat(as_ho_et_al(PARAMS), "model"), flat(as_ho_et_al(AVERAGES), "model")
    optimizer = {"beta1_power": np.float32(0.9), "global_step": np.int64(800_000)}
    return raw | {name + EMA: x for name, x in averages.items()} | optimizer


def written(tmp_path, changed=None):
    path = str(tmp_path / "model.npz")
    np.savez(path, **variables() if changed is None else changed)
    return path


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_network_and_both_sets_of_weights(tmp_path):
    found = load_ddpm(written(tmp_path), image_size=16)
    assert found.model == MODEL
    assert found.channels == 3
    assert_equal(found.params, PARAMS)
    assert_equal(found.ema_params, AVERAGES)


def test_names_with_the_number_of_an_output(tmp_path):
    found = load_ddpm(written(tmp_path, {name + ":0": x for name, x in variables().items()}), image_size=16)
    assert_equal(found.params, PARAMS)
    assert_equal(found.ema_params, AVERAGES)


def test_a_file_without_averages(tmp_path):
    raw = {name: x for name, x in variables().items() if not name.endswith(EMA)}
    assert load_ddpm(written(tmp_path, raw), image_size=16).ema_params is None


def test_the_published_network_is_recognised(tmp_path):
    """128 channels, (1, 2, 2, 2), two blocks, attention at 16 of 32: zeros of the right shapes."""
    global_model = UNet(out_channels=3)
    names = {}
    for i, mult in enumerate((1, 2, 2, 2)):
        for block in range(2):
            names[f"model/down_{i}/block_{block}/conv1/W"] = np.zeros((3, 3, 128, 128 * mult), np.int8)
            if i == 1:
                names[f"model/down_{i}/attn_{block}/q/W"] = np.zeros((256, 256), np.int8)
    names |= {"model/conv_in/W": np.zeros((3, 3, 3, 128)), "model/conv_out/W": np.zeros((3, 3, 128, 3))}
    from ddpm_jax.interop.ddpm import _network

    assert _network(names, 32) == (global_model, 3)


def without(name):
    return {key: x for key, x in variables().items() if key != name}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (without("model/mid/attn_1/q/b"), "variable model/mid/attn_1/q/b is missing"),
        (without("model/conv_in/W"), "variable model/conv_in/W is missing"),
        (variables() | {"model/mid/attn_1/q/b": np.zeros(3)}, r"variable model/mid/attn_1/q/b has shape \[3\]"),
        (variables() | {"model/mid/block_3/conv1/b": np.zeros(3)}, "variable model/mid/block_3/conv1/b is not known"),
        ({"weights": np.zeros(3)}, "is missing: this is no file of that code's variables"),
    ],
)
def test_files_of_another_network_are_refused(tmp_path, changed, message):
    with pytest.raises(InteropError, match=message):
        load_ddpm(written(tmp_path, changed), image_size=16)


def test_an_image_size_that_cannot_be_halved(tmp_path):
    with pytest.raises(InteropError, match="make no network for image_size=18; check --image_size"):
        load_ddpm(written(tmp_path), image_size=18)


@pytest.mark.parametrize("content", [b"text", b"PK\x03\x04torn", None])
def test_no_readable_npz(tmp_path, content):
    path = tmp_path / "model.npz"
    if content is None:
        np.savez(path, weights=np.array([object()], dtype=object))
    else:
        path.write_bytes(content)
    with pytest.raises(InteropError, match=r"no readable \.npz"):
        load_ddpm(str(path), image_size=16)
    with pytest.raises(InteropError, match="there is no such file"):
        load_ddpm(str(tmp_path / "absent.npz"), image_size=16)
