"""Pipelines of diffusers, written by diffusers and read here, and the way back."""

import dataclasses
import functools
import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax.config import Config
from ddpm_jax.interop import InteropError, diffusers_unet
from ddpm_jax.interop.diffusers import load_pipeline, save_pipeline
from ddpm_jax.models import LinearAttentionUNet, UNet

pytestmark = pytest.mark.usefixtures("quick_compilation")

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# google/ddpm-cifar10-32 and google/ddpm-celebahq-256, their config.json as published.
CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBAHQ = CIFAR10 | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    "sample_size": 256,
}
# Small, with attention on the second of two levels; each setting below is varied alone.
SMALL = CIFAR10 | {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
}
VARIANTS = {
    "as it is": {},
    "padding on all sides": {"downsample_padding": 1},
    "cosines first": {"flip_sin_to_cos": True},
    "no frequency shift": {"freq_shift": 0},
    "epsilon": {"norm_eps": 1e-2},
    "groups of one channel": {"norm_num_groups": 32},
    "one group": {"norm_num_groups": 1},
    "heads": {"attention_head_dim": 8},
    "no attention in the middle": {"add_attention": False},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, norm in the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "groups of the middle": {"attn_norm_num_groups": 4},
    "attention down only": {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
    "attention up only": {"down_block_types": ["DownBlock2D", "DownBlock2D"]},
    "attention everywhere": {
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
    },
    "classes": {"num_class_embeds": 32 * 4},  # as wide as the embedding: a transposed table would fit
    "three blocks a level": {"layers_per_block": 3},
    "gray": {"in_channels": 1, "out_channels": 1},
    "learned variance": {"out_channels": 6},
    "one level": {"block_out_channels": [32], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
}
# All that these do not say takes diffusers' own defaults.
DEFAULTS = {key: SMALL[key] for key in ("block_out_channels", "down_block_types", "up_block_types", "sample_size")}


def their_network(config):
    """With weights far from those at the start, where half of the layers would do nothing."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def saved(folder, config, scheduler=None):
    unet = their_network(config)
    diffusers.DDPMPipeline(unet, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return unet


@functools.partial(jax.jit, static_argnums=0)
def ours(model, params, x_t, t, label=None):
    return model.apply({"params": params}, x_t, t, label)


def assert_same_output(unet, model, params, size, channels=3, num_classes=0):
    t = np.array([0, 1, 17, 500, 999], np.int32)
    x_t = np.asarray(jax.random.normal(jax.random.key(1), (len(t), size, size, channels)))
    label = np.array([0, 1, 3, 2, num_classes - 1], np.int32) if num_classes else None
    with torch.no_grad():
        labels = None if label is None else torch.tensor(label).long()
        theirs = unet(torch.tensor(x_t).permute(0, 3, 1, 2), torch.tensor(t), class_labels=labels).sample
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    found = ours(model, params, x_t, t, label)
    assert found.dtype == jnp.float32
    assert np.abs(theirs).max() > 0.1
    assert np.abs(found - theirs).max() <= 1e-4 * np.abs(theirs).max()


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("config", [SMALL | v for v in VARIANTS.values()] + [DEFAULTS], ids=[*VARIANTS, "defaults"])
def test_each_setting_alone_there_and_back(config, tmp_path):
    unet = saved(tmp_path / "theirs", config)
    model, params, diffusion, sampling = load_pipeline(str(tmp_path / "theirs"))
    channels, num_classes = config.get("in_channels", 3), config.get("num_class_embeds", 0)
    assert count(params) == sum(p.numel() for p in unet.parameters())
    assert_same_output(unet, model, params, 8, channels, num_classes)
    # Back: diffusers loads what we write, and each tensor is the same to the last bit.
    out = str(tmp_path / "ours")
    complete = [full_settings("diffusion") | diffusion, full_settings("sampling") | sampling]
    save_pipeline(out, model, params, image_size=8, channels=channels, diffusion=complete[0], sampling=complete[1])
    again = diffusers.DDPMPipeline.from_pretrained(out).unet
    wanted, found = unet.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert_same_output(again, model, params, 8, channels, num_classes)
    assert jax.tree.all(jax.tree.map(np.array_equal, load_pipeline(out).params, params))


def full_settings(section):
    return dataclasses.asdict(getattr(Config(), section))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "size", "parameters"),
    [
        (CIFAR10, 32, 35_746_307),
        (CELEBAHQ | {"block_out_channels": [32, 32, 64, 64, 128, 128]}, 64, None),
    ],
    ids=["ddpm-cifar10-32", "ddpm-celebahq-256, narrow"],
)
def test_the_published_networks(config, size, parameters, tmp_path):
    unet = saved(tmp_path / "p", config | {"sample_size": size})
    model, params, _, _ = load_pipeline(str(tmp_path / "p"))
    assert count(params) == sum(p.numel() for p in unet.parameters())
    assert parameters in (None, count(params))
    assert_same_output(unet, model, params, size)


def test_celebahq_256_has_as_many_parameters():
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**CELEBAHQ)
    settings = diffusers_unet.unet_settings(CELEBAHQ)
    size, channels = settings.pop("image_size"), settings.pop("channels")
    x_t = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    shapes = jax.eval_shape(UNet(**settings).init, jax.random.key(0), x_t, jax.ShapeDtypeStruct((1,), jnp.int32))
    assert count(shapes) == sum(p.numel() for p in theirs.parameters()) == 113_673_219


# Older layouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "theirs"
    saved(path, SMALL)
    return path


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def weights_of(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(weights_of(folder))
    change(tensors)
    safetensors.numpy.save_file(tensors, weights_of(folder))


def assert_same_params(a, b):
    assert jax.tree.all(jax.tree.map(np.array_equal, load_pipeline(str(a)).params, load_pipeline(str(b)).params))


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def with_old_names(tensors):
    for name in list(tensors):
        if ".attentions." in name:
            x, new = tensors.pop(name), name
            for now, before in OLD_NAMES.items():
                new = new.replace(now, before)
            tensors[new] = x


def test_attention_by_its_older_names(folder, tmp_path):
    old = copy_of(folder, tmp_path)
    rewrite(old, with_old_names)
    assert any(".query." in name for name in safetensors.numpy.load_file(weights_of(old)))
    assert_same_params(old, folder)
    # diffusers reads the renamed file as we do.
    theirs = diffusers.UNet2DModel.from_pretrained(old / "unet").state_dict()
    wanted = diffusers.UNet2DModel.from_pretrained(folder / "unet").state_dict()
    assert all(torch.equal(theirs[key], wanted[key]) for key in wanted)


def test_all_files_in_one_folder(folder, tmp_path):
    """As google/ddpm-cifar10-32 lies on the hub."""
    flat = copy_of(folder, tmp_path)
    for part in ("unet", "scheduler"):
        for path in (flat / part).iterdir():
            path.rename(flat / path.name)
        (flat / part).rmdir()
    assert_same_params(flat, folder)


def test_bin_file(folder, tmp_path):
    old = copy_of(folder, tmp_path)
    torch.save(
        diffusers.UNet2DModel.from_pretrained(old / "unet").state_dict(), old / "unet" / "diffusion_pytorch_model.bin"
    )
    weights_of(old).unlink()
    assert_same_params(old, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(folder, tmp_path, dtype):
    half = copy_of(folder, tmp_path)
    diffusers.UNet2DModel.from_pretrained(half / "unet").to(dtype).save_pretrained(half / "unet")
    params, exact = (load_pipeline(str(path)).params for path in (half, folder))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), params, exact)


# What is refused


def drop(tensors):
    del tensors["conv_in.weight"]


def reshape(tensors):
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2].copy()


def add(tensors):
    tensors["extra.weight"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"tensor conv_in\.weight is missing"),
        (reshape, r"tensor conv_in\.weight has shape \[32, 2, 3, 3\], and its config asks for \[32, 3, 3, 3\]"),
        (add, r"tensor extra\.weight is not known"),
    ],
)
def test_weights_of_another_network_are_refused(folder, tmp_path, change, message):
    path = copy_of(folder, tmp_path)
    rewrite(path, change)
    with pytest.raises(InteropError, match=message):
        load_pipeline(str(path))


def test_a_truncated_file_is_refused(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    weights_of(path).write_bytes(weights_of(folder).read_bytes()[:-1000])
    with pytest.raises(InteropError, match=r"model\.safetensors: is damaged or no safetensors"):
        load_pipeline(str(path))


class Malicious:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = copy_of(folder, tmp_path)
    weights_of(path).unlink()
    for content in (Malicious(), {"conv_in.weight": Malicious()}):
        with (path / "unet" / "diffusion_pytorch_model.bin").open("wb") as file:
            pickle.dump(content, file)
        with pytest.raises(InteropError, match=r"model\.bin: is damaged, or holds more than tensors .*do not use it"):
            load_pipeline(str(path))
        torch.save(content, path / "unet" / "diffusion_pytorch_model.bin")
        with pytest.raises(InteropError, match=r"do not use it"):
            load_pipeline(str(path))
    torch.save({"conv_in.weight": [1, 2]}, path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InteropError, match=r"conv_in\.weight is no tensor"):
        load_pipeline(str(path))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"center_input_sample": True}, "center_input_sample=True is not supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' is not supported"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
        ({"downsample_type": "resnet"}, "downsample_type='resnet' is not supported"),
        ({"mid_block_type": None}, "mid_block_type=None is not supported"),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor=1.4 is not supported"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial' is not supported"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types='SkipDownBlock2D'"),
        ({"up_block_types": ["DownBlock2D", "UpBlock2D"]}, "up_block_types='DownBlock2D'"),
        ({"block_out_channels": [32, 48]}, r"block_out_channels=\[32, 48\] is not supported"),
        ({"time_embedding_dim": 64}, "time_embedding_dim=64 is not supported"),
        ({"sample_size": None}, "sample_size=None is not supported"),
        ({"sample_size": [8, 16]}, r"sample_size=\[8, 16\] is not supported"),
        ({"in_channels": 4}, "in_channels=4 is not supported"),
        ({"attention_head_dim": 24}, "attention_head_dim=24 is not supported"),
        ({"novelty": 3}, "novelty=3 is not known here"),
        ({"_class_name": "UNet2DConditionModel"}, "unet is a UNet2DConditionModel"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(setting, message):
    with pytest.raises(InteropError, match=message):
        diffusers_unet.unet_settings(SMALL | setting)


def test_every_setting_of_diffusers_is_known():
    assert set(diffusers_unet._DEFAULTS) == set(diffusers.UNet2DModel().config) - {"_use_default_values"}
    for key, value in diffusers_unet._DEFAULTS.items():
        assert diffusers.UNet2DModel().config[key] == value


def test_a_learned_variance_goes_both_ways(tmp_path):
    unet = their_network(SMALL | {"out_channels": 6})
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "theirs")
    model, params, diffusion, sampling = load_pipeline(str(tmp_path / "theirs"))
    assert (diffusion["learned_variance"], sampling["variance"]) == (True, "learned")
    complete = full_settings("diffusion") | diffusion, full_settings("sampling") | sampling | {"method": "ddim"}
    save_pipeline(str(tmp_path / "p"), model, params, image_size=8, diffusion=complete[0], sampling=complete[1])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_a_learned_variance_without_an_output_for_it_is_refused(tmp_path):
    saved(tmp_path / "p", SMALL, diffusers.DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(InteropError, match="the unet has no output for a variance"):
        load_pipeline(str(tmp_path / "p"))


@pytest.mark.parametrize("missing", ["unet/config.json", "scheduler/scheduler_config.json", "weights"])
def test_an_incomplete_folder_is_refused(folder, tmp_path, missing):
    path = copy_of(folder, tmp_path)
    (weights_of(path) if missing == "weights" else path / missing).unlink()
    with pytest.raises(InteropError, match="missing"):
        load_pipeline(str(path))


def test_torn_json_is_refused(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    (path / "unet/config.json").write_text("{")
    with pytest.raises(InteropError, match=r"config\.json: no readable JSON"):
        load_pipeline(str(path))


def test_a_name_that_is_neither_folder_nor_in_the_cache(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InteropError, match=r"^google/ddpm-none: no such folder; .* its cache has none$"):
        load_pipeline("google/ddpm-none")
    with pytest.raises(InteropError, match="neither a folder nor a pipeline"):
        load_pipeline("/no/such/folder")


# Writing


def test_what_exists_is_not_overwritten_and_nothing_torn_is_left(folder, tmp_path, monkeypatch):
    model, params, diffusion, sampling = load_pipeline(str(folder))
    diffusion, sampling = full_settings("diffusion") | diffusion, full_settings("sampling") | sampling
    save = functools.partial(
        save_pipeline, model=model, params=params, image_size=8, diffusion=diffusion, sampling=sampling
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(InteropError, match="is there already"):
        save(str(tmp_path / "there"))

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(str(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_another_network_is_refused(tmp_path):
    model = LinearAttentionUNet(out_channels=1)
    with pytest.raises(InteropError, match="LinearAttentionUNet: diffusers has no such network"):
        save_pipeline(str(tmp_path / "p"), model, {}, image_size=8, diffusion={}, sampling={})


@pytest.mark.parametrize(("method", "kind"), [("ddpm", "DDPM"), ("ddim", "DDIM")])
def test_the_pipeline_that_diffusers_finds_is_of_the_run_s_method(folder, tmp_path, method, kind):
    model, params, diffusion, _ = load_pipeline(str(folder))
    diffusion, sampling = full_settings("diffusion") | diffusion, full_settings("sampling") | {"method": method}
    save_pipeline(str(tmp_path / "p"), model, params, image_size=8, diffusion=diffusion, sampling=sampling)
    assert json.loads((tmp_path / "p" / "model_index.json").read_text())["_class_name"] == f"{kind}Pipeline"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert type(pipeline).__name__ == f"{kind}Pipeline"
    assert type(pipeline.scheduler).__name__ == f"{kind}Scheduler"
    picture = pipeline(num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 8, 8, 3)
