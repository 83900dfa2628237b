import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
by_name = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(name: str) -> dict:
    config = load(CONFIGS[0].parent / f"{name}.py").get_config()
    return {field: config_lib.get(config, field) for field in config_lib.field_names()}


def test_the_promised_configs_are_there():
    promised = "digits flowers flowers_residual cifar10 cifar10_labels celebahq256 fashion_mnist"
    assert set(promised.split()) <= {path.stem for path in CONFIGS}


@by_name
def test_it_is_valid(path):
    config = load(path).get_config()
    assert type(config) is Config
    config_lib.validate(config)
    assert config is not load(path).get_config()


@by_name
def test_its_docstring_gives_command_source_expected_result_and_whether_it_was_measured(path):
    text = load(path).__doc__
    assert f"python -m ddpm_jax.train --config configs/{path.name}" in text
    assert "Source:" in text
    assert "Expected" in text
    assert re.search(r"measured", text, re.IGNORECASE)


def test_cifar10_labels_differs_from_cifar10_in_what_it_says():
    plain, labelled = values("cifar10"), values("cifar10_labels")
    differing = {field for field in plain if plain[field] != labelled[field]}
    assert {field for field in differing if not field.startswith("sampling.")} == {
        "dtype",
        "model.num_classes",
        "model.label_dropout",
        "optimizer.ema_start",
        "train.num_samples",
    }


def test_celebahq256_is_the_recipe_of_ho_et_al():
    # hojonathanho/diffusion, scripts/run_celebahq.py
    expected = {
        "data.image_size": 256,
        "model.channel_mults": (1, 1, 2, 2, 4, 4),
        "model.attention_resolutions": (16,),
        "model.dropout": 0.0,
        "optimizer.learning_rate": 2e-5,
        "optimizer.warmup_steps": 5000,
        "train.batch_size": 64,
        "sampling.method": "ddpm",
        "sampling.variance": "fixed_small",
    }
    found = values("celebahq256")
    assert {field: found[field] for field in expected} == expected


def test_cifar10_is_the_recipe_of_ho_et_al():
    # hojonathanho/diffusion, scripts/run_cifar.py
    expected = {
        "data.source": "tfds:cifar10",
        "data.split": "train",
        "data.image_size": 32,
        "data.channels": 3,
        "data.random_flip": True,
        "model.base_channels": 128,
        "model.channel_mults": (1, 2, 2, 2),
        "model.num_res_blocks": 2,
        "model.attention_resolutions": (16,),
        "model.dropout": 0.1,
        "model.num_classes": 0,
        "diffusion.schedule": "linear",
        "diffusion.num_timesteps": 1000,
        "diffusion.prediction": "eps",
        "diffusion.loss": "l2",
        "diffusion.loss_weight": "uniform",
        "optimizer.learning_rate": 2e-4,
        "optimizer.lr_decay": "constant",
        "optimizer.warmup_steps": 5000,
        "optimizer.weight_decay": 0.0,
        "optimizer.grad_clip_norm": 1.0,
        "optimizer.ema_decay": 0.9999,
        "optimizer.ema_start": 0,
        "train.batch_size": 128,
        "train.num_steps": 800_000,
        "train.accumulate": 1,
        "sampling.method": "ddpm",
        "sampling.num_steps": 1000,
        "sampling.variance": "fixed_large",
        "sampling.clip_x0": True,
    }
    assert {field: values("cifar10")[field] for field in expected} == expected


def test_flowers_takes_all_splits_at_64():
    expected = {
        "data.source": "tfds:oxford_flowers102",
        "data.image_size": 64,
        "data.channels": 3,
    }
    found = values("flowers")
    assert {field: found[field] for field in expected} == expected
    assert sorted(found["data.split"].split("+")) == ["test", "train", "validation"]


def test_digits_needs_neither_network_nor_tensorflow():
    found = values("digits")
    assert found["data.source"] == "sklearn:digits"
    assert found["data.channels"] == 1
    assert not found["data.random_flip"]  # a mirrored 2 is no digit


def test_fashion_mnist_is_gray_and_from_tfds():
    found = values("fashion_mnist")
    assert (found["data.source"], found["data.channels"]) == ("tfds:fashion_mnist", 1)


def test_fashion_mnist_is_the_annotated_diffusion_model_over_five_epochs():
    expected = {
        "data.image_size": 28,
        "data.random_flip": True,
        "model.kind": "linear_attention_unet",
        "model.num_classes": 10,
        "diffusion.num_timesteps": 200,
        "diffusion.scale_betas": True,
        "diffusion.loss": "huber",
        "optimizer.learning_rate": 1e-3,
        "train.batch_size": 64,
        "train.num_steps": 5 * 60_000 // 64,
    }
    assert {field: values("fashion_mnist")[field] for field in expected} == expected


def test_flowers_residual_is_the_write_ups_recipe():
    expected = {
        "data.source": "tfds:oxford_flowers102",
        "data.image_size": 64,
        "data.normalizer": "mean_std",
        "model.kind": "residual_unet",
        "model.base_channels": 32,
        "model.channel_mults": (1, 2, 3, 4),
        "model.num_res_blocks": 2,
        "diffusion.schedule": "offset_cosine",
        "diffusion.time": "continuous",
        "diffusion.prediction": "eps",
        "diffusion.loss": "l1",
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 1e-4,
        "optimizer.grad_clip_norm": 0.0,
        "data.random_flip": False,
        "optimizer.ema_decay": 0.999,
        "train.batch_size": 64,
        "train.num_steps": 50 * (5 * 7385 // 64 + 1),
        "sampling.spacing": "trailing",
    }
    assert {field: values("flowers_residual")[field] for field in expected} == expected


@by_name
def test_half_a_chain_remains_for_its_checkpoints_and_pictures(path):
    train = load(path).get_config().train
    assert train.log_every <= train.checkpoint_every <= train.num_steps
    assert train.sample_every <= train.num_steps


@pytest.mark.slow
@by_name
def test_it_trains_resumes_and_samples_when_shrunk(path, tmp_path, capfd):
    from ddpm_jax import experiment, generate, train, training

    config = load(path).get_config()
    size, channels = config.data.image_size, config.data.channels
    pixels = np.random.default_rng(0).integers(0, 256, (12, size, size, channels), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(12) % max(config.model.num_classes, 1))
    config.data.source = f"npz:{tmp_path / 'images.npz'}"
    config.model.base_channels, config.model.num_res_blocks = 8, 1
    config.train.batch_size, config.train.num_steps, config.train.num_samples = 4, 3, 2
    config.sampling.num_steps = 2
    state = train.train(config, str(tmp_path / "run"))
    assert int(state.step) == 3
    assert int(state.skipped_steps) == 0
    config.train.num_steps = 5
    state = train.train(config, str(tmp_path / "run"))
    assert int(state.step) == 5
    assert "continues at step 3 of 5" in capfd.readouterr().err
    assert (tmp_path / "run" / "samples" / "step_00000003.png").exists()
    run = experiment.load(str(tmp_path / "run"))
    drawn = generate.draw(
        run.config, run.schedule, run.denoise_fn, training.make_mesh(), num_images=2, seed=0, batch_size=2
    )
    assert drawn.shape == (2, size, size, channels)
    assert drawn.std() > 10  # neither gray nor black
    assert not np.array_equal(*drawn)
