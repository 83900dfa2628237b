"""``python -m ddpm_jax.convert``: what is converted, every program works on."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax import convert, experiment
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.interop import diffusers_scheduler, diffusers_unet
from ddpm_jax.interop.diffusers import load_pipeline, save_pipeline
from ddpm_jax.models import UNet

MODEL = UNet(
    out_channels=1, base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4
)
SIZE = 8


def random_params(seed):
    x_t = np.zeros((1, SIZE, SIZE, 1), np.float32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x_t, np.zeros(1, np.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes)


def config_for_saving():
    import dataclasses

    config = Config()
    config.diffusion.num_timesteps, config.diffusion.scale_betas = 50, True
    config.sampling.num_steps = 5
    return dataclasses.asdict(config.diffusion), dataclasses.asdict(config.sampling)


@pytest.fixture(scope="module")
def params():
    return random_params(0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, params):
    """A folder of diffusers, of a tiny network of gray images with fifty timesteps."""
    path = tmp_path_factory.mktemp("pipelines") / "theirs"
    diffusion, sampling = config_for_saving()
    save_pipeline(str(path), MODEL, params, image_size=SIZE, channels=1, diffusion=diffusion, sampling=sampling)
    return path


def broken(pipeline, path):
    import shutil

    shutil.copytree(pipeline, path)
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["conv_in.bias"]
    safetensors.numpy.save_file(tensors, file)
    return path


@pytest.fixture(scope="module")
def results(run_program, tmp_path_factory, pipeline):
    cwd = tmp_path_factory.mktemp("convert")
    lines = {
        "in": ["from-diffusers", pipeline, "--workdir=w"],
        "in again": ["from-diffusers", pipeline, "--workdir=w"],
        "broken": ["from-diffusers", broken(pipeline, cwd / "broken"), "--workdir=x"],
        "no folder": ["from-diffusers", "absent/folder", "--workdir=x"],
        "no path": ["from-diffusers", "--workdir=x"],
        "no command": ["--workdir=x"],
        "another command": ["from-keras", "x", "--workdir=x"],
        "no workdir": ["from-diffusers", pipeline],
        "out": ["to-diffusers", "--workdir=w", "--out=back"],
        "out again": ["to-diffusers", "--workdir=w", "--out=back"],
        "no out": ["to-diffusers", "--workdir=w"],
        "no run": ["to-diffusers", "--workdir=nowhere", "--out=y"],
        "no size": ["from-ddpm", "absent.npz", "--workdir=x"],
        "no file": ["from-ddpm", "absent.npz", "--workdir=x", "--image_size=8"],
    }
    return cwd, run_program("ddpm_jax.convert", lines, cwd, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("in again", ["w", "holds a run already"]),
        ("broken", ["conv_in.bias", "is missing"]),
        ("no folder", ["absent/folder", "no such folder"]),
        ("no path", ["from-diffusers", "write from-diffusers PATH"]),
        ("no command", ["no command", "to-diffusers"]),
        ("another command", ["from-keras", "from-ddpm PATH"]),
        ("no workdir", ["--workdir is missing"]),
        ("out again", ["back", "is there already"]),
        ("no out", ["--out is missing"]),
        ("no run", ["nowhere", "holds no run"]),
        ("no size", ["--image_size is missing"]),
        ("no file", ["absent.npz", "no such file"]),
    ],
)
def test_mistakes_end_in_one_line(results, name, parts):
    _, found = results
    assert found[name].code in (1, 2)
    assert all(part in found[name].error for part in parts)


def test_no_workdir_is_left_behind(results):
    cwd, found = results
    assert found["in"].code == found["out"].code == 0
    assert sorted(path.name for path in cwd.iterdir()) == ["back", "broken", "w"]


def test_weights_arrive_raw_and_averaged_and_leave_bit_for_bit(results, params, pipeline):
    cwd, _ = results
    for weights in ("ema", "raw"):
        run = experiment.load(str(cwd / "w"), weights=weights)
        assert jax.tree.all(jax.tree.map(np.array_equal, run.params, params))
    assert (
        run.config.sampling.num_steps
        == diffusers_scheduler.schedule_settings(
            json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
        ).sampling["num_steps"]
    )
    assert run.config.diffusion.num_timesteps == 50
    assert (run.config.data.image_size, run.config.data.channels) == (SIZE, 1)
    back = load_pipeline(str(cwd / "back"))
    assert jax.tree.all(jax.tree.map(np.array_equal, back.params, params))
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert json.loads((cwd / "back" / file).read_text()) == json.loads((pipeline / file).read_text())
    assert diffusers_unet.unet_settings(json.loads((cwd / "back/unet/config.json").read_text()))["num_groups"] == 4


@pytest.mark.slow
def test_sample_and_train_go_on_from_a_converted_workdir(results, run_program, params, tmp_path):
    cwd, _ = results
    np.savez(cwd / "images.npz", images=np.random.default_rng(0).integers(0, 256, (40, SIZE, SIZE, 1), np.uint8))
    sampled = run_program("ddpm_jax.sample", {"s": ["--workdir=w", "--out=s.png", "--num_images=4"]}, cwd)["s"]
    assert sampled.code == 0, sampled.stderr
    settings = ["--config.train.batch_size=8", "--config.train.num_steps=2", "--config.train.num_samples=2"]
    lines = {
        "no data": ["--workdir=w", *settings],
        "train": ["--workdir=w", "--config.data.source=npz:images.npz", *settings],
        "on": ["--workdir=w", "--config.train.num_steps=3"],
        "no run": ["--workdir=nowhere"],
        "another network": ["--workdir=w", "--config.model.base_channels=16"],
    }
    found = run_program("ddpm_jax.train", lines, cwd)
    assert "data.source=''" in found["no data"].error
    assert found["train"].code == 0, found["train"].stderr
    assert "continues at step 0 of 2" in found["train"].stderr
    assert found["on"].code == 0, found["on"].stderr  # the overrides of the run before are in the workdir's config
    assert "continues at step 2 of 3" in found["on"].stderr
    assert "nowhere holds no run" in found["no run"].error
    assert "another model" in found["another network"].error
    run = experiment.load(str(cwd / "w"), weights="raw")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), run.params, params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # three steps of Adam away, and no further


def test_a_run_with_a_normaliser_is_not_written_for_diffusers(monkeypatch):
    config = Config()
    config.data.normalizer = "mean_std"
    monkeypatch.setattr(convert, "FLAGS", SimpleNamespace(out="y", workdir="w", weights="ema", step=None))
    monkeypatch.setattr(experiment, "load", lambda *_, **__: experiment.Run(config, None, None, None))
    with pytest.raises(ConfigError, match=r"^config\.data\.normalizer='mean_std': diffusers' pipelines know images in"):
        convert._to_diffusers()
