import dataclasses
import json
import math
import re
import warnings

import pytest

from ddpm_jax import config as config_lib
from ddpm_jax import limits
from ddpm_jax.config import Config, ConfigError, field_names, from_dict, nearest_field, to_dict, validate
from ddpm_jax.diffusion import ScheduleWarning
from ddpm_jax.fields import differences

# What scripts rely on, as the project's first issue lists it.
PROMISED = {
    name
    for line in """
seed dtype
data.source data.split data.data_dir data.image_size data.channels data.random_flip data.placement
model.kind model.base_channels model.channel_mults model.num_res_blocks model.attention_resolutions model.attention
model.dropout model.num_classes model.label_dropout model.block
diffusion.schedule diffusion.num_timesteps diffusion.prediction diffusion.loss diffusion.loss_weight
optimizer.learning_rate optimizer.lr_decay optimizer.warmup_steps optimizer.weight_decay optimizer.grad_clip_norm
optimizer.ema_decay optimizer.ema_start
train.batch_size train.num_steps train.log_every train.checkpoint_every train.sample_every train.accumulate train.remat
sampling.method sampling.num_steps sampling.eta sampling.spacing sampling.variance sampling.clip_x0
sampling.rederive_eps sampling.guidance
mesh.data mesh.fsdp
""".splitlines()
    for name in line.split()
}


CONTINUOUS = {"diffusion.time": "continuous", "model.kind": "residual_unet", "diffusion.schedule": "cosine"}


def changed(fields: dict) -> Config:
    config = Config()
    for field, value in fields.items():
        section, _, name = field.rpartition(".")
        setattr(config_lib.get(config, section) if section else config, name, value)
    return config


def test_the_promised_fields_exist():
    assert set(field_names()) >= PROMISED


def test_the_defaults_are_valid():
    config = Config()
    validate(config)
    assert config == Config()  # a look, and no more


def test_every_field_survives_json():
    config = Config()
    for field in field_names():
        value = config_lib.get(config, field)
        other = {bool: lambda x: not x, int: lambda x: x + 7, float: lambda x: x / 3 + 0.1, str: lambda x: x + "?"}
        new = (3, 1, 4) if isinstance(value, tuple) else "there" if value is None else other[type(value)](value)
        config = from_dict(to_dict(config) | _nested(field, new, config))
        assert config_lib.get(config, field) == new
    back = from_dict(json.loads(json.dumps(to_dict(config))))
    assert back == config
    assert type(back.model.channel_mults) is tuple
    assert not differences(config, back, field_names())


def _nested(field: str, value, config: Config) -> dict:
    section, _, name = field.rpartition(".")
    return {section: to_dict(config)[section] | {name: value}} if section else {name: value}


def test_a_missing_field_takes_its_default_and_an_unknown_one_is_named():
    assert from_dict({"train": {"batch_size": 4}}) == changed({"train.batch_size": 4})
    with pytest.raises(ConfigError, match=r"config\.train\.batchsize: .*config\.train\.batch_size\?"):
        from_dict({"train": {"batchsize": 4}})
    with pytest.raises(ConfigError, match=r"config\.train: no such field"):
        from_dict({"train": 4})


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        # choices
        ({"dtype": "float16"}, "choose one of auto, float32, bfloat16"),
        ({"data.channels": 4}, "choose one of 1, 3"),
        ({"data.placement": "gpu"}, "choose one of host, device"),
        ({"model.attention": "flash"}, "choose one of xla, cudnn"),
        ({"model.block": "swin"}, "choose one of None, convnext, resnet"),
        ({"diffusion.schedule": "lienar"}, "choose one of linear, cosine"),
        ({"diffusion.prediction": "epsilon"}, "choose one of eps, x0, v"),
        ({"diffusion.time": "real"}, "choose one of discrete, continuous"),
        ({"data.normalizer": "zscore"}, "choose one of none, mean_std"),
        ({"diffusion.loss": "mse"}, "choose one of l1, l2, huber"),
        ({"diffusion.loss_weight": "snr"}, "choose one of uniform"),
        ({"diffusion.snr_gamma": 1.0}, "is of min_snr, not of config.diffusion.loss_weight='uniform'"),
        ({"diffusion.snr_gamma": 0.0, "diffusion.loss_weight": "min_snr"}, "must be positive"),
        ({"optimizer.lr_decay": "linear"}, "choose one of constant, cosine"),
        ({"train.remat": "all"}, "choose one of none, blocks, dots"),
        ({"sampling.method": "euler"}, "choose one of ddim, ddpm"),
        ({"sampling.spacing": "even"}, "choose one of leading, trailing, linspace, quadratic"),
        ({"sampling.end": "last"}, "choose one of clean, first"),
        ({"sampling.variance": "large"}, "choose one of fixed_small, fixed_large"),
        # ranges
        ({"data.image_size": 0}, "positive"),
        ({"model.base_channels": -1}, "positive"),
        ({"model.num_res_blocks": 0}, "positive"),
        ({"model.num_heads": 0}, "positive"),
        ({"diffusion.num_timesteps": 0}, "positive"),
        ({"optimizer.learning_rate": 0.0}, "positive"),
        ({"optimizer.learning_rate": float("nan")}, "positive"),
        ({"train.batch_size": 0}, "positive"),
        ({"train.num_steps": 0}, "positive"),
        ({"train.log_every": 0}, "positive"),
        ({"train.checkpoint_every": 0}, "positive"),
        ({"train.sample_every": -5}, "positive"),
        ({"train.num_samples": 0}, "positive"),
        ({"train.keep_last": 0}, "positive"),
        ({"train.accumulate": 0}, "positive"),
        ({"sampling.num_steps": 0}, "positive"),
        ({"mesh.fsdp": 0}, "positive"),
        ({"seed": -1}, "not be negative"),
        ({"model.num_classes": -1}, "not be negative"),
        ({"optimizer.warmup_steps": -1}, "not be negative"),
        ({"optimizer.weight_decay": -0.1}, "not be negative"),
        ({"optimizer.grad_clip_norm": -1.0}, "not be negative"),
        ({"optimizer.ema_start": -1}, "not be negative"),
        ({"train.keep_every": -1}, "not be negative"),
        ({"sampling.variance": "learned"}, "diffusion.learned_variance"),
        ({"sampling.guidance": -1.0}, "not be negative"),
        ({"sampling.steps_offset": -1}, "not be negative"),
        ({"sampling.clip_range": 0.0}, "positive"),
        ({"diffusion.beta_start": 0.0}, r"must lie in \(0, 1\)"),
        ({"diffusion.beta_end": 1.5}, r"must lie in \(0, 1\)"),
        ({"sampling.dynamic_threshold": 1.0}, r"\[0, 1\)"),
        ({"sampling.dynamic_threshold": 0.9, "sampling.clip_x0": False}, "switch it on"),
        ({"sampling.max_threshold": 2.0}, "set that too"),
        ({"sampling.dynamic_threshold": 0.9, "sampling.max_threshold": 1.0}, "must exceed 1"),
        ({"model.dropout": 1.0}, r"\[0, 1\)"),
        ({"model.label_dropout": -0.1}, r"\[0, 1\)"),
        ({"optimizer.ema_decay": 1.0}, r"\[0, 1\)"),
        ({"sampling.eta": 1.5}, r"0 \.\. 1"),
        ({"sampling.eta": float("nan")}, r"0 \.\. 1"),
        # types
        ({"seed": True}, "must be int, not bool"),
        ({"train.batch_size": 8.0}, "must be int, not float"),
        ({"train.num_steps": "10"}, "must be int, not str"),
        ({"data.random_flip": 1}, "must be bool, not int"),
        ({"sampling.clip_x0": "yes"}, "must be bool, not str"),
        ({"model.dropout": True}, "must be float, not bool"),
        ({"optimizer.learning_rate": "2e-4"}, "must be float, not str"),
        ({"data.source": None}, "must be str, not NoneType"),
        ({"data.data_dir": 3}, r"must be str \| None, not int"),
        ({"model.channel_mults": 2}, "must be tuple"),
        ({"model.channel_mults": (1, 2.0)}, "must be tuple"),
        ({"model.channel_mults": (True, 2)}, "must be tuple"),
        ({"model.attention_resolutions": "16"}, "must be tuple"),
        ({"diffusion.betas": (0.1, "0.2")}, "must be tuple"),
        ({"diffusion.betas": 0.1}, "must be tuple"),
        ({"diffusion.rescale_zero_snr": 1}, "must be bool, not int"),
        # what does not fit together
        (CONTINUOUS | {"diffusion.schedule": "linear"}, "'linear' is a table of T .* cosine, offset_cosine"),
        (CONTINUOUS | {"diffusion.rescale_zero_snr": True, "diffusion.prediction": "v"}, "rescales a table.*discrete"),
        (CONTINUOUS | {"diffusion.learned_variance": True}, "between two timesteps; use discrete"),
        ({"data.mean": (0.1,)}, "is of data.normalizer='mean_std'"),
        ({"data.std": (0.1,)}, "is of data.normalizer='mean_std'"),
        ({"data.normalizer": "mean_std", "data.mean": (0.1,), "data.std": (1.0,)}, "each of the 3 channels"),
        ({"data.normalizer": "mean_std", "data.mean": (0.1,) * 3}, r"or \(\) in both"),
        ({"data.normalizer": "mean_std", "data.std": (0.0,) * 3, "data.mean": (0.1,) * 3}, "must be positive"),
        ({"data.normalizer": "mean_std", "data.std": (1.0,) * 3, "data.mean": (math.nan,) * 3}, "must be finite"),
        ({"model.channel_mults": ()}, "one positive factor"),
        ({"model.channel_mults": (1, 0)}, "one positive factor"),
        ({"data.image_size": 36}, "divisible by 8"),
        ({"model.attention_resolutions": (16, 12)}, "heights are 32, 16, 8, 4"),
        ({"model.base_channels": 2}, "at least 4"),
        ({"model.label_dropout": 0.1}, "set config.model.num_classes"),
        ({"sampling.guidance": 2.0}, "label_dropout > 0; use 1"),
        ({"sampling.guidance": 2.0, "model.num_classes": 10}, "label_dropout > 0; use 1"),
        ({"train.accumulate": 3}, "must divide config.train.batch_size=128"),
        ({"sampling.eta": 0.5, "sampling.method": "ddpm"}, "'ddpm' has no eta; use 0"),
        ({"sampling.num_steps": 1001}, r"1 \.\. 1000"),
        ({"sampling.num_steps": 1, "sampling.spacing": "quadratic"}, "use trailing"),
        ({"diffusion.num_timesteps": 20, "sampling.num_steps": 20}, "raise num_timesteps .* or set scale_betas=False"),
        (
            {"diffusion.num_timesteps": 3, "diffusion.schedule": "table", "diffusion.betas": (0.1, 0.2)},
            "diffusion.betas has 2 numbers",
        ),
        ({"diffusion.schedule": "cosine", "diffusion.betas": (0.1, 0.2)}, "use 'table', or leave betas out"),
        ({"diffusion.prediction": "eps", "diffusion.rescale_zero_snr": True}, "use v or x0"),
        ({"sampling.end": "first", "sampling.method": "ddpm"}, "is of ddim, not of 'ddpm'; use clean"),
        ({"sampling.steps_offset": 20}, r"0 \.\. 19, .* or fewer steps"),
        ({"sampling.steps_offset": 1, "sampling.spacing": "trailing"}, "use 0, or leading"),
        ({"mesh.data": 0}, "-1"),
        ({"data.placement": "disk"}, "host, device, stream"),
        ({"data.shuffle_buffer": 0}, "must be positive"),
        ({"data.placement": "stream", "data.source": "npz:a.npz"}, "use host"),
        ({"data.placement": "stream"}, r"sklearn:digits'; use host"),
        (
            {"data.mean": (), "data.placement": "stream", "data.source": "folder:x", "data.normalizer": "mean_std"},
            r"set config\.data\.mean and config\.data\.std",
        ),
        ({"mesh.data": -2}, "-1"),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_a_bad_value_is_refused_with_its_field_its_value_and_the_remedy(fields, remedy):
    with pytest.raises(ConfigError, match=remedy) as caught:
        validate(changed(fields))
    message = str(caught.value)
    assert "\n" not in message
    named = [
        field
        for field, value in fields.items()
        if re.search(rf"config\.{re.escape(field)}=", message) and (repr(value) in message or str(value) in message)
    ]
    assert named or re.match(r"config\.sampling\.spacing='quadratic'", message)


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer.learning_rate": 1},  # an int is a fine float
        {"model.attention_resolutions": ()},
        {"model.channel_mults": [1, 2, 2, 2]},
        {"diffusion.num_timesteps": 20, "diffusion.scale_betas": False, "sampling.num_steps": 20},
        {"diffusion.num_timesteps": 21, "sampling.num_steps": 21},
        {"diffusion.num_timesteps": 5, "diffusion.schedule": "cosine", "sampling.num_steps": 5},
        {"sampling.guidance": 2.0, "model.num_classes": 10, "model.label_dropout": 0.1},
        {"sampling.eta": 1.0},
        {"sampling.num_steps": 1, "sampling.spacing": "trailing"},
        {"sampling.num_steps": 1000},
        {"diffusion.schedule": "table", "diffusion.betas": [0.5, 1], "diffusion.num_timesteps": 2}
        | {"diffusion.prediction": "v", "sampling.num_steps": 2},
        {"diffusion.rescale_zero_snr": True, "diffusion.prediction": "x0", "sampling.spacing": "trailing"},
        {"sampling.steps_offset": 19, "sampling.end": "first", "sampling.clip_range": 2},
        {"train.accumulate": 128},
        {"mesh.data": 2, "mesh.fsdp": 2},
        {"data.normalizer": "mean_std"},  # measured when the run starts
        {"data.normalizer": "mean_std", "data.mean": [0.1, 0.2, 0.3], "data.std": (1, 0.5, 0.2)},
        {"model.kind": "residual_unet", "diffusion.time": "continuous", "diffusion.schedule": "cosine"},
        {"model.kind": "residual_unet"},
        {"data.placement": "stream", "data.source": "tfds:lsun/bedroom", "data.shuffle_buffer": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::ddpm_jax.diffusion.ScheduleWarning")
def test_a_good_value_is_taken(fields):
    config = changed(fields)
    validate(config)
    assert config == changed(fields)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("train.batchsize", "train.batch_size"),
        ("train.bach_size", "train.batch_size"),
        ("batch_size", "train.batch_size"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("data.image_sise", "data.image_size"),
        ("seeed", "seed"),
        ("sampling.number_steps", "sampling.num_steps"),
    ],
)
def test_nearest_field(misspelt, meant):
    assert nearest_field(misspelt) == meant


def test_nearest_field_finds_something_for_anything():
    assert {nearest_field(x) for x in ("", ".", "zzz", "x.y.z")} <= set(field_names())


def test_differences_names_the_fields_asked_for_and_no_others():
    a, b = Config(), changed({"model.dropout": 0.1, "seed": 3, "model.channel_mults": (1, 2)})
    assert differences(a, b, ["model.dropout", "seed"]) == ["model.dropout: 0.0 != 0.1", "seed: 0 != 3"]
    assert differences(a, b, ["model.channel_mults"]) == ["model.channel_mults: (1, 2, 2, 2) != (1, 2)"]
    assert differences(a, b, ["train.batch_size"]) == []


def test_a_table_of_betas_does_not_fill_the_screen():
    a, b = changed({"diffusion.betas": tuple(i / 1001 for i in range(1, 1001))}), Config()
    assert differences(a, b, ["diffusion.betas"]) == [
        f"diffusion.betas: ({1 / 1001}, {2 / 1001}, ..., {1000 / 1001}) != ()"
    ]
    a.diffusion.betas = ("x",) * 1000
    with pytest.raises(ConfigError, match=r"config\.diffusion\.betas=\('x', 'x', \.\.\., 'x'\): must be tuple"):
        validate(a)


def test_zero_snr_asks_for_a_plan_that_begins_with_pure_noise():
    fields = {"diffusion.rescale_zero_snr": True, "diffusion.prediction": "v"}
    with pytest.warns(ScheduleWarning, match=r"spacing='leading': starts at t = 980, .*use trailing"):
        validate(changed(fields))
    for good in ({"sampling.spacing": "trailing"}, {"sampling.spacing": "linspace"}, {"sampling.steps_offset": 19}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            validate(changed(fields | good))


def test_a_list_is_the_same_network_as_a_tuple():
    # A config file may say channel_mults=[1, 2]; config.json gives tuples back.
    config = changed({"model.channel_mults": [1, 2, 2, 2]})
    validate(config)
    assert not differences(config, from_dict(json.loads(json.dumps(to_dict(config)))), field_names())


def test_two_configs_share_no_section():
    one, other = Config(), Config()
    one.train.batch_size = 1
    assert other == Config()
    assert dataclasses.asdict(one) != dataclasses.asdict(other)


def test_the_choices_of_the_network_are_the_networks_own():
    # Written out in limits.py, which is to be imported without Flax.
    from ddpm_jax import models

    assert limits.CHOICES["model.attention"] == models.ATTENTIONS
    assert limits.CHOICES["train.remat"] == models.REMATS
