"""Schedules, timesteps and chains beside diffusers' own, on one network with one noise."""

import dataclasses
import functools
import inspect
import json
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, experiment
from ddpm_jax.config import Config, DiffusionConfig, SamplingConfig
from ddpm_jax.interop.diffusers_scheduler import schedule_settings, scheduler_config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

KEY = jax.random.key(5)
X_T = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
SHORT = {"num_train_timesteps": 100, "beta_end": 0.15}  # ends in as much noise as 1,000 steps to .02 do
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
TABLE = np.linspace(0.01, 0.3, 40).tolist()
BIG = np.float32(5e-4)  # no rounding: a real difference


def file_of(class_name, **values):
    return {"_class_name": class_name, "_diffusers_version": "0.35.0", **values}


def theirs(found):
    """Their scheduler of a file."""
    return getattr(diffusers, found["_class_name"]).from_config(found)


def config_of(found, num_steps=None):
    """Our config of a file, valid."""
    settings = schedule_settings(found)
    config = Config(diffusion=DiffusionConfig(**settings.diffusion), sampling=SamplingConfig(**settings.sampling))
    config.sampling.num_steps = num_steps or config.sampling.num_steps
    config_lib.validate(config)
    return config


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffusion.ScheduleWarning)
        yield


# Schedules


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"beta_start": 1e-3, "beta_end": 0.03},
        {"num_train_timesteps": 100},  # 1 - alpha_bar ends at .64: their range is not scaled by 1000 / T
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50, "beta_start": 0.3, "beta_end": 0.4},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "sigmoid", "beta_start": 1e-7, "beta_end": 2e-3, "num_train_timesteps": 5000},
        {"trained_betas": TABLE, "num_train_timesteps": 40},
        {"trained_betas": TABLE, "num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
        {**ZERO_SNR, "trained_betas": TABLE, "num_train_timesteps": 40},
    ],
    ids=str,
)
def test_tables_are_theirs(values):
    """To the rounding of their float32 tables: 1e-7 in the betas, more in the product of a thousand of them."""
    found = file_of("DDPMScheduler", **values)
    ours, reference = experiment.make_schedule(config_of(found)), theirs(found)
    zero_snr = values.get("rescale_betas_zero_snr", False)
    # Zero SNR divides neighbours of a table that falls to 0: their last betas have lost digits.
    np.testing.assert_allclose(ours.betas, reference.betas, rtol=0, atol=2e-4 if zero_snr else 1e-7)
    np.testing.assert_allclose(ours.alpha_bars, reference.alphas_cumprod, rtol=5e-4, atol=1e-6)
    if not zero_snr:  # what they would have, had they multiplied in float64
        np.testing.assert_allclose(ours.alpha_bars, np.cumprod(1 - reference.betas.double().numpy()), rtol=2e-4)
    if zero_snr:
        assert float(ours.alpha_bars[-1]) == float(reference.alphas_cumprod[-1]) == 0.0


def test_defaults_are_those_of_both_classes():
    ours = schedule_settings(file_of("DDPMScheduler"))
    for name in ("DDPMScheduler", "DDIMScheduler"):
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        defaults = {key: p.default for key, p in parameters.items() if key not in ("self", "args", "kwargs")}
        spelled_out, left_out = schedule_settings(file_of(name, **defaults)), schedule_settings(file_of(name))
        assert spelled_out == left_out
        assert left_out.diffusion == ours.diffusion


# Timesteps


@pytest.mark.parametrize("class_name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    ("spacing", "offset"),
    [("leading", 0), ("leading", 1), ("leading", 3), ("trailing", 0), ("trailing", 1), ("linspace", 1)],
)
def test_timesteps_are_theirs(class_name, spacing, offset):
    for T, S in ((1000, 2), (1000, 10), (1000, 30), (1000, 50), (1000, 333), (100, 7), (64, 16), (1000, 1000)):
        found = file_of(class_name, num_train_timesteps=T, timestep_spacing=spacing, steps_offset=offset)
        if spacing == "leading" and (S - 1) * (T // S) + offset >= T:
            with pytest.raises(config_lib.ConfigError, match=f"steps_offset={offset}: must lie in 0"):
                config_of(found, S)
            continue
        reference = theirs(found)
        reference.set_timesteps(S)
        t, t_prev = plan_of(config_of(found, S))
        np.testing.assert_array_equal(t, reference.timesteps)
        np.testing.assert_array_equal(t_prev, [*t[1:], -1])


def plan_of(config):
    options = experiment.sampling_options(config)
    return options["plan"] or diffusion.timestep_plan(
        config.diffusion.num_timesteps, options["num_steps"], options["spacing"]
    )


# Chains


@jax.jit
def network(x_t, t):
    """Of nobody's data; not affine, different at every pixel, and such that clipping matters."""
    pixels = jnp.arange(x_t[0].size).reshape(x_t.shape[1:])
    return 0.6 * x_t + 0.5 * jnp.tanh(2 * x_t + 0.05 * t.reshape(-1, 1, 1, 1) + jnp.sin(pixels))


@functools.cache
def noise_at(t):
    """What ``sample`` draws."""
    return torch.from_numpy(np.array(jax.random.normal(jax.random.fold_in(KEY, int(t)), X_T.shape)))


@jax.jit
def with_variance(x_t, t):
    """The network with a second half of channels, -1 .. 1, for a variance."""
    return jnp.concatenate([network(x_t, t), jnp.tanh(3 * x_t - 0.02 * t.reshape(-1, 1, 1, 1))], axis=-1)


def our_chain(found, S, eta=0.0, rederive_eps=False):
    config = config_of(found, S)
    config.sampling.eta, config.sampling.rederive_eps = eta, rederive_eps
    options = experiment.sampling_options(config) | {"trajectory": S}
    denoise_fn = with_variance if config.diffusion.learned_variance else network
    x0, trajectory = diffusion.sample(denoise_fn, experiment.make_schedule(config), X_T, KEY, **options)
    np.testing.assert_array_equal(trajectory.t, plan_of(config)[0])
    return np.concatenate([trajectory.x_t, x0[None]])


class Stride:
    """Stands for num_inference_steps in ``t - T // num_inference_steps``: the step to the table's next entry."""

    def __init__(self, stride):
        self.stride = stride

    def __rfloordiv__(self, T):
        return self.stride


def their_chain(found, S, *, right_table=False, **options):
    """x_T, every x_t, x0. ``right_table`` makes DDIM step to the next timestep of its own table."""
    scheduler, x, chain = theirs(found), torch.from_numpy(X_T), [X_T]
    scheduler.set_timesteps(S)
    timesteps = scheduler.timesteps.tolist()
    learned = found.get("variance_type") == "learned_range"
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        output = np.array((with_variance if learned else network)(x.numpy(), jnp.full(len(X_T), t)))
        if learned:  # the halves are of axis 1 there
            output = np.concatenate(np.split(output, 2, axis=-1), axis=1)
        output = torch.from_numpy(output)
        if right_table:
            scheduler.num_inference_steps = Stride(t - t_next)
        noise = {} if found["_class_name"] == "DDPMScheduler" else {"variance_noise": noise_at(t)}
        with mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *_, t=t, **__: noise_at(t)):
            x = scheduler.step(output, t, x, **noise, **options).prev_sample
        chain.append(x.numpy())
    return np.stack(chain)


def difference(ours, reference):
    """Of each x_t of two chains, relative to its largest pixel."""
    axes = tuple(range(1, ours.ndim))
    return np.abs(ours - reference).max(axes) / np.abs(reference).max(axes)


def assert_same(ours, reference):
    assert np.isfinite(ours).all()
    assert difference(ours, reference).max() < 1e-4, difference(ours, reference)


PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [{"clip_sample": True}, {"clip_sample": False}, {"clip_sample_range": 0.6}], ids=str)
def test_ddpm_chains(variance, prediction, clip):
    for spacing in ("leading", "linspace"):  # both end in a step from t = 0
        found = file_of("DDPMScheduler", **SHORT, **clip, variance_type=variance, prediction_type=prediction)
        found["timestep_spacing"] = spacing
        assert_same(our_chain(found, 12), their_chain(found, 12))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_chains_with_a_learned_variance(prediction):
    found = file_of("DDPMScheduler", **SHORT, variance_type="learned_range", prediction_type=prediction)
    ours = our_chain(found, 12)
    assert_same(ours, their_chain(found, 12))
    assert difference(ours, our_chain(found | {"variance_type": "fixed_small"}, 12)).max() > BIG


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [{"clip_sample": True}, {"clip_sample": False}, {"clip_sample_range": 0.6}], ids=str)
@pytest.mark.parametrize("rederive", [False, True])
def test_ddim_chains(eta, prediction, clip, rederive):
    for plan in ({}, {"steps_offset": 1, "set_alpha_to_one": False}, {"set_alpha_to_one": False}):
        found = file_of("DDIMScheduler", **SHORT, **clip, **plan, prediction_type=prediction)
        reference = their_chain(found, 10, eta=eta, use_clipped_model_output=rederive)
        assert_same(our_chain(found, 10, eta, rederive), reference)
    trailing = file_of("DDIMScheduler", **SHORT, **clip, prediction_type=prediction, timestep_spacing="trailing")
    reference = their_chain(trailing, 10, eta=eta, use_clipped_model_output=rederive)
    assert_same(our_chain(trailing, 10, eta, rederive), reference)


def test_each_switch_of_the_chains_above_matters():
    """So that a pair of chains cannot agree because nothing happens in either."""

    def chain(eta=0.0, rederive_eps=False, **values):
        return our_chain(file_of("DDIMScheduler", **SHORT, **values), 10, eta, rederive_eps)

    first = chain()
    for other in (
        chain(eta=0.5),
        chain(rederive_eps=True),
        chain(clip_sample=False),
        chain(clip_sample_range=0.6),
        chain(set_alpha_to_one=False),
        chain(steps_offset=1),
        chain(prediction_type="v_prediction"),
    ):
        assert difference(other, first).max() > BIG


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("S", [10, 100])
def test_ddim_at_a_thousand_timesteps(S, eta):
    """The published CIFAR-10 settings. Their float32 product of a thousand factors is what limits the agreement."""
    found = file_of("DDIMScheduler")
    assert_same(our_chain(found, S, eta), their_chain(found, S, eta=eta))


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("S", [7, 30])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_their_ddim_misses_its_own_table_where_it_is_not_regular(spacing, S, eta):
    """They step to t - T // S, whatever the next timestep is (diffusers issues 9261 and 11347)."""
    found = file_of("DDIMScheduler", **SHORT, timestep_spacing=spacing)
    ours = our_chain(found, S, eta)
    assert difference(ours, their_chain(found, S, eta=eta))[1:].max() > BIG
    assert_same(ours, their_chain(found, S, eta=eta, right_table=True))


@pytest.mark.parametrize(("S", "offset"), [(40, 2), (60, 1)])
def test_their_ddim_stops_early_where_the_offset_reaches_the_stride(S, offset):
    """The last step goes from t = T // S to t = 0 and not to clean data, even with set_alpha_to_one."""
    found = file_of("DDIMScheduler", **SHORT, steps_offset=offset)
    ours, reference = our_chain(found, S), their_chain(found, S)
    assert_same(ours[:-1], reference[:-1])
    assert difference(ours, reference)[-1] > BIG
    assert_same(ours, their_chain(found, S, right_table=True))


@pytest.mark.parametrize("values", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}], ids=str)
def test_their_ddpm_with_fixed_large_leaves_noise_in_the_last_image(values):
    """They add noise wherever t > 0, also in the step to clean data; fixed_small has next to none."""
    found = file_of("DDPMScheduler", **SHORT, **values)
    assert_same(our_chain(found, 20), their_chain(found, 20))
    found["variance_type"] = "fixed_large"
    ours, reference = our_chain(found, 20), their_chain(found, 20)
    assert_same(ours[:-1], reference[:-1])
    t = int(plan_of(config_of(found, 20))[0][-1])
    left = float(1 - theirs(found).alphas_cumprod[t]) ** 0.5 * noise_at(t).numpy()
    assert np.abs(left).max() > 0.1
    np.testing.assert_allclose(reference[-1] - ours[-1], left, atol=1e-4)


def test_their_variance_at_the_last_step_and_their_fixed_large_log():
    reference = theirs(file_of("DDPMScheduler", **SHORT))
    reference.set_timesteps(100)
    assert float(reference._get_variance(0)) == pytest.approx(1e-20)  # ours is 0; neither adds noise at t = 0
    x = jnp.ones((1, 1))
    schedule = experiment.make_schedule(config_of(file_of("DDPMScheduler", **SHORT)))
    assert float(diffusion.posterior(schedule, x, x, 0, -1)[1].item()) == 0.0
    found = file_of("DDPMScheduler", **SHORT, variance_type="fixed_large_log")
    assert np.isnan(their_chain(found, 12)).any()  # the root of a logarithm
    assert_same(our_chain(found, 12), their_chain(found | {"variance_type": "fixed_large"}, 12))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_chains_with_zero_terminal_snr(clip, prediction):
    values = SHORT | ZERO_SNR | {"prediction_type": prediction, "clip_sample": clip}
    ddpm, ddim = file_of("DDPMScheduler", **values), file_of("DDIMScheduler", **values)
    assert_same(our_chain(ddpm, 10), their_chain(ddpm, 10))
    for eta in (0.0, 0.5):
        assert_same(our_chain(ddim, 10, eta), their_chain(ddim, 10, eta=eta))
        assert_same(our_chain(ddim, 10, eta, True), their_chain(ddim, 10, eta=eta, use_clipped_model_output=True))
    # With eta = 1 the first step takes nothing of eps. They take the root of what 1 - alpha_bar_prev - sigma^2 leaves
    # in float32, 2e-4. The other two chains say which is right: eta = 1 with the rederived eps is DDPM.
    assert 1e-4 < difference(our_chain(ddim, 10, 1.0), their_chain(ddim, 10, eta=1.0))[1] < 1e-3
    assert_same(our_chain(ddim, 10, 1.0, True), their_chain(ddpm, 10))


# Thresholding


def test_thresholding_becomes_its_two_numbers():
    found = file_of("DDIMScheduler", thresholding=True, clip_sample=False, clip_sample_range=3.0, sample_max_value=1.5)
    sampling = schedule_settings(found).sampling
    assert (sampling["dynamic_threshold"], sampling["max_threshold"]) == (0.995, 1.5)
    assert (sampling["clip_x0"], sampling["clip_range"]) == (True, 1.0)
    plain = schedule_settings(file_of("DDIMScheduler")).sampling
    assert not {"dynamic_threshold", "max_threshold"} & set(plain)
    # The default cap of 1 holds the bounds where they are.
    assert schedule_settings(file_of("DDIMScheduler", thresholding=True, clip_sample=False)).sampling == plain
    with pytest.raises(ValueError, match=r"sample_max_value=0\.5: .*use at least 1"):
        schedule_settings(file_of("DDIMScheduler", thresholding=True, sample_max_value=0.5))


def test_thresholding_goes_back():
    fields, sampling = dataclasses.asdict(DiffusionConfig()), dataclasses.asdict(SamplingConfig())
    for cap in (0.0, 1.5):
        back = scheduler_config(fields, sampling | {"dynamic_threshold": 0.9, "max_threshold": cap}, "DDIMScheduler")
        assert back["thresholding"] is True
        assert (back["dynamic_thresholding_ratio"], back["sample_max_value"]) == (0.9, cap or 1e6)
    with pytest.raises(ValueError, match=r"sampling\.clip_range=2\.0: .*use 1"):
        scheduler_config(fields, sampling | {"dynamic_threshold": 0.9, "clip_range": 2.0}, "DDIMScheduler")


def test_thresholding_with_their_default_cap_is_clipping():
    found = file_of("DDIMScheduler", **SHORT, thresholding=True, clip_sample=False)
    assert_same(our_chain(found, 10), their_chain(found, 10))


@pytest.mark.skipif(
    "dynamic_threshold" not in inspect.signature(diffusion.sample).parameters, reason="sample has no thresholding yet"
)
@pytest.mark.parametrize("top", [1.3, 100.0])
@pytest.mark.parametrize("class_name", ["DDPMScheduler", "DDIMScheduler"])
def test_chains_with_thresholding(class_name, top):
    found = file_of(class_name, **SHORT, thresholding=True, sample_max_value=top, dynamic_thresholding_ratio=0.9)
    assert_same(our_chain(found, 10), their_chain(found, 10))


# Files


def test_the_published_files():
    """google/ddpm-cifar10-32, and google/ddpm-celebahq-256 as of diffusers 0.1.1."""
    common = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
    }
    for variance in ("fixed_large", "fixed_small"):
        config = config_of(common | {"variance_type": variance})
        assert config.diffusion == DiffusionConfig(scale_betas=False)
        wanted = SamplingConfig(method="ddpm", num_steps=1000, variance=variance, rederive_eps=False)
        assert config.sampling == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "_class_name='PNDMScheduler': only DDPMScheduler and DDIMScheduler"),
        ({"_class_name": None}, "_class_name=None: only"),
        ({"lambda_min_clipped": -5.1}, r"lambda_min_clipped=-5\.1: not a setting .*; remove it"),
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace': is not supported; only linear, scaled_linear"),
        ({"variance_type": "learned"}, "variance_type='learned': is not supported; only fixed_small"),
        ({"prediction_type": "flow"}, "prediction_type='flow': .*epsilon, sample, v_prediction"),
        ({"timestep_spacing": "quad"}, "timestep_spacing='quad': .*leading, trailing, linspace"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000': must be a int"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True: must be a int"),
        ({"clip_sample": 1}, "clip_sample=1: must be a bool"),
        ({"beta_start": None}, "beta_start=None: must be a float"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas=.*: must be null or a list of numbers"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas: has 2 numbers for num_train_timesteps=1000"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True: .*prediction_type='epsilon'"),
    ],
    ids=str,
)
def test_what_has_no_counterpart_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message) as refusal:
        schedule_settings(file_of("DDPMScheduler") | values)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_known_keys_that_change_nothing():
    harmless = {"_use_default_values": ["clip_sample"], "skip_prk_steps": True, "tensor_format": "pt"}
    for name in ("DDPMScheduler", "DDIMScheduler"):
        assert schedule_settings(file_of(name, **harmless)) == schedule_settings(file_of(name))
        assert schedule_settings(file_of(name, predict_epsilon=True)) == schedule_settings(file_of(name))
        assert schedule_settings(file_of(name, predict_epsilon=False)).diffusion["prediction"] == "x0"
    # DDPM does not read set_alpha_to_one, nor DDIM variance_type; nor either an offset of another spacing.
    assert schedule_settings(file_of("DDPMScheduler", set_alpha_to_one=False)).sampling["end"] == "clean"
    trailing = {"timestep_spacing": "trailing", "steps_offset": 1}
    assert schedule_settings(file_of("DDIMScheduler", **trailing)).sampling["steps_offset"] == 0


# And back


@pytest.mark.parametrize("class_name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        SHORT | {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample_range": 2.0},
        {"beta_schedule": "sigmoid", "timestep_spacing": "linspace"},
        {"trained_betas": TABLE, "num_train_timesteps": 40, "variance_type": "fixed_large", "set_alpha_to_one": False},
        {**SHORT, **ZERO_SNR},
        {"thresholding": True, "sample_max_value": 1.5},
    ],
    ids=str,
)
def test_a_file_comes_back_the_same(class_name, values, tmp_path):
    settings = schedule_settings(file_of(class_name, **values))
    diffusion_fields = dataclasses.asdict(DiffusionConfig()) | settings.diffusion
    sampling_fields = dataclasses.asdict(SamplingConfig()) | settings.sampling
    back = json.loads(json.dumps(scheduler_config(diffusion_fields, sampling_fields, class_name)))
    if class_name == "DDPMScheduler":
        assert "set_alpha_to_one" not in back
    else:
        assert "variance_type" not in back
        settings.sampling["variance"] = "fixed_small"
    if class_name == "DDIMScheduler" and values.get("beta_schedule") == "sigmoid":  # which that class does not know
        np.testing.assert_allclose(back["trained_betas"], theirs(file_of("DDPMScheduler", **values)).betas, atol=1e-8)
    else:
        assert schedule_settings(back) == settings
    (tmp_path / "scheduler_config.json").write_text(json.dumps(back))
    loaded = getattr(diffusers, class_name).from_pretrained(tmp_path)
    assert set(back) - {"_class_name"} <= set(dict(loaded.config))  # every key is one that they read
    reference = theirs(file_of("DDPMScheduler", **values))
    np.testing.assert_allclose(loaded.alphas_cumprod, reference.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("class_name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_every_schedule_of_ours_goes_to_them(class_name, schedule):
    config = Config(diffusion=DiffusionConfig(schedule=schedule, num_timesteps=200))  # scaled by 5
    back = scheduler_config(dataclasses.asdict(config.diffusion), dataclasses.asdict(config.sampling), class_name)
    reference = theirs(json.loads(json.dumps(back)))
    np.testing.assert_allclose(experiment.make_schedule(config).betas, reference.betas, rtol=0, atol=2e-7)


def test_settings_that_they_do_not_have():
    fields = dataclasses.asdict(DiffusionConfig())
    sampling = dataclasses.asdict(SamplingConfig())
    with pytest.raises(ValueError, match=r"sampling\.spacing='quadratic': .*leading, trailing, linspace"):
        scheduler_config(fields, sampling | {"spacing": "quadratic"}, "DDIMScheduler")
    assert (
        scheduler_config(fields, sampling | {"variance": "learned"}, "DDPMScheduler")["variance_type"]
        == "learned_range"
    )
    with pytest.raises(ValueError, match="_class_name='PNDMScheduler'"):
        scheduler_config(fields, sampling, "PNDMScheduler")
