import dataclasses
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, experiment, models, training
from ddpm_jax.config import Config, ConfigError, DataConfig, DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from ddpm_jax.experiment import RunError

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 4


def tiny(**sections):
    defaults = {
        "data": DataConfig(image_size=SIZE, channels=1),
        "model": ModelConfig(base_channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=()),
        "diffusion": DiffusionConfig(num_timesteps=100),
    }
    return Config(**defaults | sections)


def alpha_bars(config):
    count = config.diffusion.num_timesteps
    return np.cumprod(1 - np.linspace(1e-4, 0.02, count) * 1000 / count)


# Config -> parts


def test_the_network_is_the_one_of_the_config():
    config = tiny(
        dtype="bfloat16",
        data=DataConfig(image_size=8, channels=3),
        model=ModelConfig(
            base_channels=16,
            channel_mults=(1, 3),
            num_res_blocks=2,
            attention_resolutions=(8,),
            num_classes=4,
            dropout=0.2,
        ),
        train=TrainConfig(remat="dots"),
    )
    model = experiment.make_model(config)
    params = jax.eval_shape(experiment.make_init_fn(config, model), jax.random.key(0))
    assert params["conv_in"]["kernel"].shape == (3, 3, 3, 16)
    assert params["down_1_block_1"]["conv_1"]["kernel"].shape == (3, 3, 48, 48)
    assert params["class_embedding"]["embedding"].shape[0] == 5
    assert "down_0_attention_1" in params
    assert (model.dropout, model.remat, model.dtype) == (0.2, "dots", jnp.bfloat16)


def test_a_network_takes_the_settings_that_it_declares():
    model = ModelConfig(kind="linear_attention_unet", base_channels=8, channel_mults=(1,), block="resnet", dropout=0.3)
    found = experiment.make_model(tiny(model=model, train=TrainConfig(remat="blocks"), dtype="bfloat16"))
    assert type(found) is models.LinearAttentionUNet
    own = models.LinearAttentionUNet(
        out_channels=1,
        base_channels=8,
        channel_mults=(1,),
        block="resnet",
        dropout=0.3,
        remat="blocks",
        dtype=jnp.dtype("bfloat16"),
        num_res_blocks=model.num_res_blocks,
        num_groups=model.num_groups,
    )
    assert found == own  # num_heads=None is the network's own number


def test_any_module_is_a_network_with_one_line_in_the_dictionary(monkeypatch):
    class Pointwise(models.Network):
        out_channels: int
        base_channels: int = 5

        def __call__(self, x_t, t, label=None, train=False):
            return self.base_channels * x_t

    monkeypatch.setitem(models.NETWORKS, "pointwise", Pointwise)
    model = ModelConfig(kind="pointwise", base_channels=8, attention_resolutions=ModelConfig().attention_resolutions)
    config = tiny(data=DataConfig(image_size=8, channels=3), model=model)
    config_lib.validate(config)
    network = experiment.make_model(config)
    assert (type(network), network.out_channels, network.base_channels) == (Pointwise, 3, 8)
    denoise_fn = experiment.make_denoise_fn(network, {}, experiment.make_schedule(config))
    np.testing.assert_array_equal(
        denoise_fn(jnp.ones((1, 2, 2, 3)), jnp.zeros(1, jnp.int32)), 8 * np.ones((1, 2, 2, 3))
    )
    model.num_classes, model.label_dropout = 3, 0.1
    with pytest.raises(
        ConfigError, match=r"^config\.model\.num_classes=3: the network 'pointwise' has no such setting"
    ):
        experiment.make_model(config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dit", r"^config\.model\.kind='dit': choose one of unet, linear_attention_unet, residual_unet$"),
        ("unet", r"^config\.diffusion\.time='continuous': the network 'unet' .* model\.kind=residual_unet$"),
    ],
)
def test_a_network_that_does_not_exist_or_fit_is_refused(kind, message):
    config = tiny(diffusion=DiffusionConfig(time="continuous", schedule="cosine"))
    config.model.kind = kind
    config_lib.validate(config)  # which knows no networks
    with pytest.raises(ConfigError, match=message):
        experiment.make_model(config)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("unet", "model.block", "resnet"),
        ("linear_attention_unet", "model.attention", "cudnn"),
        ("linear_attention_unet", "model.attention_resolutions", (4,)),
    ],
)
def test_a_setting_that_the_network_does_not_have_is_refused(kind, field, value):
    config = tiny(model=ModelConfig(kind=kind, base_channels=8))
    setattr(config.model, field.removeprefix("model."), value)
    with pytest.raises(ConfigError) as caught:
        experiment.make_model(config)
    assert str(caught.value) == f"config.{field}={value!r}: the network {kind!r} has no such setting; leave it out"


def test_the_optimizer_is_the_one_of_the_config():
    settings = OptimizerConfig(learning_rate=0.5, lr_decay="cosine", warmup_steps=10, grad_clip_norm=2.0)
    _, learning_rate = experiment.make_optimizer(tiny(optimizer=settings, train=TrainConfig(num_steps=30)))
    np.testing.assert_allclose([learning_rate(i) for i in (5, 10, 20, 30)], [0.25, 0.5, 0.25, 0], atol=1e-6)


def test_an_attention_that_cannot_run_is_refused_by_its_field():
    model = ModelConfig(base_channels=8, attention="cudnn")
    with pytest.raises(ConfigError, match=r"^config\.model\.attention='cudnn': .*use 'xla'"):
        experiment.make_model(tiny(model=model, dtype="bfloat16"))


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"^config\.train\.batch_size=9: .*config\.train\.accumulate=2"):
        experiment.make_mesh(tiny(train=TrainConfig(batch_size=9, accumulate=2)))


# A run and its workdir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    workdir, config = tmp_path_factory.mktemp("run"), tiny()
    experiment.write_config(workdir, config)
    optimizer, _ = experiment.make_optimizer(config)
    init_fn = experiment.make_init_fn(config, experiment.make_model(config))
    state = training.init_state(init_fn, optimizer, training.make_mesh(), jax.random.key(0))
    with training.open_checkpoints(str(workdir)) as checkpoints:
        for step in (10, 20):
            moved = jax.tree.map(lambda x, step=step: x + step, state.ema_params)
            training.save(checkpoints, state._replace(step=jnp.int32(step), ema_params=moved))
        checkpoints.wait_until_finished()
    return workdir, state.params


@pytest.mark.parametrize(("options", "shift"), [({}, 20), ({"step": 10}, 10), ({"weights": "raw"}, 0)])
def test_load_takes_the_weights_and_the_step_asked_for(run_dir, options, shift):
    workdir, params = run_dir
    run = experiment.load(str(workdir), **options)
    assert run.config == tiny()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + shift), run.params, params)
    np.testing.assert_allclose(run.schedule.alpha_bars, alpha_bars(run.config), rtol=1e-5)


def test_what_is_loaded_samples(run_dir):
    run = experiment.load(str(run_dir[0]), weights="raw")
    x_t = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE, 1))
    options = {"num_steps": 2, "spacing": "trailing", "clip_x0": False}
    x0 = diffusion.sample(run.denoise_fn, run.schedule, x_t, jax.random.key(1), **options)
    # A new network answers 0, so that eta = 0 only rescales: x0 = x_T / sqrt(alpha_bar) of the first step.
    np.testing.assert_allclose(x0, x_t / math.sqrt(alpha_bars(run.config)[-1]), rtol=1e-4)


def test_loading_writes_nothing(run_dir):
    before = sorted((str(path), path.stat().st_mtime_ns) for path in run_dir[0].rglob("*"))
    experiment.load(str(run_dir[0]))
    assert sorted((str(path), path.stat().st_mtime_ns) for path in run_dir[0].rglob("*")) == before


def test_equal_networks_share_compiled_samplers(run_dir):
    one, two = (experiment.load(str(run_dir[0]), weights=weights).denoise_fn for weights in ("raw", "ema"))
    assert one.func == two.func
    assert hash(one.func) == hash(two.func)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "best"}, "weights=best: choose ema or raw"),
        ({"step": 15}, r"no checkpoint of step 15; its checkpoints are 10, 20$"),
    ],
)
def test_a_wrong_load_gets_one_line(run_dir, options, message):
    with pytest.raises(RunError, match=message) as caught:
        experiment.load(str(run_dir[0]), **options)
    assert "\n" not in str(caught.value)


def test_load_where_there_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"holds no run \(config.json is missing\); train one"):
        experiment.load(str(tmp_path))
    experiment.write_config(tmp_path, tiny())
    with pytest.raises(RunError, match="it has no checkpoint yet"):
        experiment.load(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("text", ["", "{", '{"data": {"sorce": "x"}}', '{"data": 3}', "\xff"])
def test_a_config_that_cannot_be_read(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"config\.json: ") as caught:
        experiment.read_config(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_config_survives_its_file(tmp_path):
    config = tiny(model=ModelConfig(channel_mults=(1, 2, 3), attention_resolutions=(), dropout=0.1), seed=5)
    experiment.write_config(tmp_path, config)
    assert experiment.read_config(str(tmp_path)) == config
    assert json.loads((tmp_path / "config.json").read_text())["model"]["channel_mults"] == [1, 2, 3]


def test_a_plan_is_made_where_num_steps_and_spacing_do_not_say_it_all():
    config = Config()
    assert experiment.sampling_options(config)["plan"] is None
    config.sampling.num_steps, config.sampling.steps_offset, config.sampling.end = 10, 1, "first"
    config.sampling.clip_range = 0.5
    options = experiment.sampling_options(config)
    np.testing.assert_array_equal(options["plan"][0], np.arange(901, 0, -100))
    np.testing.assert_array_equal(options["plan"][1], [*np.arange(801, 0, -100), 0])
    assert options["clip_x0"] == (-0.5, 0.5)
    config.sampling.clip_x0 = False
    assert experiment.sampling_options(config)["clip_x0"] is False


def test_the_normaliser_moves_black_and_white():
    config = Config()
    assert experiment.make_normalizer(config) == ((0.0,), (1.0,))
    config.data.normalizer, config.sampling.clip_range = "mean_std", 0.5
    with pytest.raises(ConfigError, match=r"^config\.data\.mean=\(\): .*train to measure"):
        experiment.sampling_options(config)
    stand_in = config_lib.with_stand_in_normalizer(config)
    assert experiment.make_normalizer(stand_in) == ((0.0,) * 3, (1.0,) * 3)
    config.data.mean, config.data.std = (0.5, 0.0, -0.5), (0.5, 1.0, 0.25)
    assert config_lib.with_stand_in_normalizer(config) is config
    low, high = experiment.sampling_options(config)["clip_x0"]
    np.testing.assert_allclose(low, [-2, -0.5, 0])
    np.testing.assert_allclose(high, [0, 0.5, 4])


def test_a_workdir_of_another_network_or_diffusion_is_refused(tmp_path):
    experiment.check_workdir(str(tmp_path), tiny())
    experiment.write_config(tmp_path, tiny())
    wider = tiny(model=dataclasses.replace(tiny().model, base_channels=24))
    experiment.check_workdir(str(tmp_path), wider)  # nothing has been trained yet
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(RunError, match="base_channels"):
        experiment.check_workdir(str(tmp_path), wider)
    other = dataclasses.replace(
        tiny(), seed=9, train=TrainConfig(num_steps=7), optimizer=OptimizerConfig(ema_decay=0.9)
    )
    with pytest.warns(UserWarning, match="other batches than it began with .*seed: 0 != 9"):
        experiment.check_workdir(str(tmp_path), other)
    other = dataclasses.replace(other, seed=0, diffusion=DiffusionConfig(num_timesteps=200, prediction="v"))
    with pytest.raises(RunError) as caught:
        experiment.check_workdir(str(tmp_path), other)
    assert "diffusion.num_timesteps: 100 != 200; diffusion.prediction: 'eps' != 'v'" in str(caught.value)
    assert "optimizer" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"placement": "stream"}, {"placement": "stream", "shuffle_buffer": 5}, "shuffle_buffer: 10000 != 5"),
        ({"placement": "host"}, {"placement": "stream"}, "placement: 'host' != 'stream'"),
        ({"placement": "stream"}, {"placement": "device"}, "placement: 'stream' != 'device'"),
        # these serve the same batches
        ({"placement": "host"}, {"placement": "device", "shuffle_buffer": 5}, None),
        ({"source": "folder:x"}, {"source": "folder:x", "placement": "stream", "shuffle_buffer": 5}, None),
    ],
)
def test_what_changes_the_order_of_a_stream_is_named(before, after, words, tmp_path):
    def with_data(fields):
        return tiny(data=dataclasses.replace(tiny().data, **({"source": "tfds:x"} | fields)))

    experiment.write_config(tmp_path, with_data(before))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        experiment.check_workdir(str(tmp_path), with_data(after))
    assert [words in str(x.message) for x in caught] == ([True] if words else [])
