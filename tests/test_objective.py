import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import diffusion, experiment, models, objective
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 4


def tiny(**sections):
    defaults = {
        "data": DataConfig(image_size=SIZE, channels=1),
        "model": ModelConfig(base_channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=()),
        "diffusion": DiffusionConfig(num_timesteps=100),
    }
    return Config(**defaults | sections)


class Spy:
    """In the place of a network: keeps what it is asked, answers with a fixed array."""

    def __init__(self, answer=0.0):
        self.answer, self.calls = answer, []

    def apply(self, variables, x_t, t, label, train, rngs):
        self.calls.append({"x_t": x_t, "t": t, "label": label, "train": train, **variables, **rngs})
        return jnp.zeros(x_t.shape) + self.answer


def images_of(count):
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 1), dtype=np.uint8)


def ask(config, count=8, seed=0, answer=0.0, labels=None, spy=None):
    spy = spy or Spy()
    spy.answer = answer
    schedule = experiment.make_schedule(config)
    batch = {"image": jnp.asarray(images_of(count))} | ({} if labels is None else {"label": jnp.asarray(labels)})
    keys = jax.random.split(jax.random.key(seed), count)
    loss, sums = objective.make_loss_fn(config, spy, schedule)({"w": 1}, batch, keys)
    return spy.calls[0], float(loss), sums


def alpha_bars(config):
    count = config.diffusion.num_timesteps
    return np.cumprod(1 - np.linspace(1e-4, 0.02, count) * 1000 / count)


@pytest.mark.parametrize("num_timesteps", [30, 100, 1000])
def test_every_timestep_is_drawn_and_as_often_as_the_others(num_timesteps):
    count = 200 * num_timesteps if num_timesteps < 1000 else 20_000
    call, _, sums = ask(tiny(diffusion=DiffusionConfig(num_timesteps=num_timesteps)), count)
    t = np.asarray(call["t"])
    assert (t.min(), t.max(), t.dtype) == (0, num_timesteps - 1, np.int32)
    counts = np.bincount(t, minlength=num_timesteps)
    expected = count / num_timesteps
    chi_squared = ((counts - expected) ** 2 / expected).sum()  # mean T - 1, variance 2 (T - 1)
    assert abs(chi_squared - (num_timesteps - 1)) < 5 * math.sqrt(2 * (num_timesteps - 1))
    np.testing.assert_array_equal(sums["loss_counts"], np.bincount(4 * t // num_timesteps, minlength=4))


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_is_the_formula_s(prediction, weighting):
    config = tiny(diffusion=DiffusionConfig(num_timesteps=100, prediction=prediction, loss_weight=weighting))
    answer = np.random.default_rng(1).normal(size=(64, SIZE, SIZE, 1)).astype(np.float32)
    call, loss, sums = ask(config, 64, answer=answer)
    t, ab = np.asarray(call["t"]), alpha_bars(config)[np.asarray(call["t"])][:, None, None, None]
    x0 = images_of(64) / 127.5 - 1
    eps = (np.asarray(call["x_t"], np.float64) - np.sqrt(ab) * x0) / np.sqrt(1 - ab)
    assert abs(eps.mean()) < 5 / math.sqrt(eps.size)
    assert abs(eps.std() - 1) < 5 / math.sqrt(2 * eps.size)
    target = {"eps": eps, "x0": x0, "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0}[prediction]
    losses = ((answer - target) ** 2).mean((1, 2, 3))
    if weighting == "min_snr":
        snr = (ab / (1 - ab)).ravel()
        losses *= np.minimum(snr, 5) / {"eps": snr, "x0": 1.0, "v": snr + 1}[prediction]
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-3)
    quarters = [losses[4 * t // 100 == i].sum() for i in range(4)]
    np.testing.assert_allclose(sums["loss_sums"], quarters, rtol=2e-3)


def test_a_learned_variance_adds_its_own_loss_and_channels():
    settings = DiffusionConfig(num_timesteps=30, prediction="v", learned_variance=True)
    config = tiny(diffusion=settings)
    answer = np.random.default_rng(1).uniform(-1, 1, (16, SIZE, SIZE, 2)).astype(np.float32)
    call, loss, _ = ask(config, 16, answer=answer)
    settings.learned_variance = False
    _, simple, _ = ask(config, 16, answer=answer[..., :1])
    schedule, x0 = experiment.make_schedule(config), jnp.asarray(images_of(16) / 127.5 - 1, jnp.float32)
    output, variance_output = jnp.split(jnp.asarray(answer), 2, axis=-1)
    added = diffusion.variance_loss(schedule, "v", output, variance_output, x0, call["x_t"], call["t"])
    assert loss == pytest.approx(simple + float(added.mean()), rel=1e-5)
    settings.learned_variance = True
    model = experiment.make_model(config)
    params = experiment.make_init_fn(config, model)(jax.random.key(0))
    assert experiment.make_denoise_fn(model, params, experiment.make_schedule(config))(x0, call["t"]).shape == (
        16,
        SIZE,
        SIZE,
        2,
    )


def test_an_example_s_draw_depends_on_its_own_key():
    spy, config = Spy(), tiny()
    loss_fn = objective.make_loss_fn(config, spy, experiment.make_schedule(config))
    batch, keys = {"image": jnp.asarray(images_of(6))}, jax.random.split(jax.random.key(0), 6)
    loss_fn({}, batch, keys)
    loss_fn({}, {"image": batch["image"][2:4]}, keys[2:4])
    for name in ("x_t", "t"):
        np.testing.assert_array_equal(spy.calls[1][name], spy.calls[0][name][2:4])
    noise = [np.asarray(x).tobytes() for x in spy.calls[0]["x_t"]]
    assert len(set(noise)) == 6


def test_the_network_is_asked_to_train():
    call, _, _ = ask(tiny())
    assert call["train"] is True
    assert call["params"] == {"w": 1}
    assert call["label"] is None
    other, _, _ = ask(tiny(), seed=1)
    assert (jax.random.key_data(call["dropout"]) != jax.random.key_data(other["dropout"])).any()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_share_of_labels_that_are_dropped(share):
    count, model = 8000, ModelConfig(base_channels=8, num_classes=5, label_dropout=share)
    labels = np.arange(count) % 5
    call, _, _ = ask(tiny(model=model), count, labels=labels)
    found = np.asarray(call["label"])
    dropped = found == 5
    np.testing.assert_array_equal(found[~dropped], labels[~dropped])
    assert abs(dropped.mean() - share) <= 5 * math.sqrt(share * (1 - share) / count)


def test_labels_are_dropped_whatever_t_is():
    model = ModelConfig(base_channels=8, num_classes=5, label_dropout=0.5)
    call, _, _ = ask(tiny(model=model), 8000, labels=np.zeros(8000, np.int32))
    correlation = np.corrcoef(np.asarray(call["t"]), np.asarray(call["label"]) == 5)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(8000)


# A network that takes the noise level, continuous times, a normaliser


class LevelSpy(Spy):
    takes = "noise_level"


def continuous(**settings):
    return tiny(diffusion=DiffusionConfig(schedule="offset_cosine", num_timesteps=100, time="continuous", **settings))


def levels(u):
    """1 - alpha_bar of offset_cosine, float64."""
    start, end = math.acos(0.95), math.acos(0.02)
    return np.sin(start + u * (end - start)) ** 2


def test_a_network_that_takes_the_noise_level_is_told_that_of_t():
    config, keys = tiny(), jax.random.split(jax.random.key(0), 50)
    schedule, batch = experiment.make_schedule(config), {"image": jnp.asarray(images_of(50))}
    spies = Spy(), LevelSpy()
    for spy in spies:
        objective.make_loss_fn(config, spy, schedule)({}, batch, keys)
    t, told = (np.asarray(spy.calls[0]["t"]) for spy in spies)
    assert told.dtype == np.float32
    np.testing.assert_allclose(told, 1 - alpha_bars(config)[t], rtol=1e-4)
    np.testing.assert_array_equal(spies[0].calls[0]["x_t"], spies[1].calls[0]["x_t"])


def test_continuous_times_are_drawn_evenly():
    count = 20_000
    call, _, sums = ask(continuous(), count, spy=LevelSpy())
    angle = np.arcsin(np.sqrt(np.asarray(call["t"], np.float64)))
    u = np.sort((angle - math.acos(0.95)) / (math.acos(0.02) - math.acos(0.95)))
    assert -1e-4 < u[0] < 1e-3
    assert 1 - 1e-3 < u[-1] < 1 + 1e-3
    kolmogorov = np.abs(u - (np.arange(count) + 0.5) / count).max()
    assert kolmogorov < 2 / math.sqrt(count)
    assert len(np.unique(u)) > 0.9 * count  # and not on a grid of T
    np.testing.assert_allclose(sums["loss_counts"], np.histogram(u, 4, (0, 1))[0], atol=2)


@pytest.mark.parametrize("weighting", diffusion.WEIGHTS)
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_the_continuous_loss_is_the_formula_s(prediction, weighting):
    gamma = {"snr_gamma": 2.0} if weighting == "min_snr" else {}
    config = continuous(prediction=prediction, loss_weight=weighting, loss="l1", **gamma)
    answer = np.random.default_rng(1).normal(size=(64, SIZE, SIZE, 1)).astype(np.float32)
    call, loss, sums = ask(config, 64, answer=answer, spy=LevelSpy())
    level = np.asarray(call["t"], np.float64)[:, None, None, None]
    signal, noise, x0 = np.sqrt(1 - level), np.sqrt(level), images_of(64) / 127.5 - 1
    eps = (np.asarray(call["x_t"], np.float64) - signal * x0) / noise
    assert abs(eps.std() - 1) < 5 / math.sqrt(2 * eps.size)
    target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[prediction]
    losses = np.abs(answer - target).mean((1, 2, 3))
    snr = ((1 - level) / level).ravel()
    of_x0 = {"uniform": None, "min_snr": np.minimum(snr, 2), "p2": snr / (1 + snr)}[weighting]
    if of_x0 is not None:
        losses *= of_x0 / {"eps": snr, "x0": 1.0, "v": snr + 1}[prediction]
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-3)
    np.testing.assert_allclose(sums["loss_sums"].sum(), losses.sum(), rtol=1e-3)


def test_at_matching_levels_the_continuous_loss_is_the_discrete_one(monkeypatch):
    """The same noise and, by decree, u = t / (T - 1): the same x_t, the same level, the same loss."""
    answer = np.random.default_rng(1).normal(size=(32, SIZE, SIZE, 1)).astype(np.float32)
    config = continuous(loss_weight="min_snr")
    config.diffusion.time = "discrete"
    discrete, loss, _ = ask(config, 32, answer=answer, spy=LevelSpy())
    t = jax.vmap(lambda key: jax.random.randint(jax.random.split(key, 4)[0], (), 0, 100))(
        jax.random.split(jax.random.key(0), 32)
    )
    schedule_at = diffusion.schedule_at
    monkeypatch.setattr(diffusion, "schedule_at", lambda name, u: schedule_at(name, t / 99))
    found, same_loss, _ = ask(continuous(loss_weight="min_snr"), 32, answer=answer, spy=LevelSpy())
    for name in ("x_t", "t"):
        np.testing.assert_allclose(found[name], discrete[name], rtol=1e-4, atol=1e-5)
    assert same_loss == pytest.approx(loss, rel=1e-4)


def test_the_loss_sees_normalised_images():
    config = tiny(diffusion=DiffusionConfig(num_timesteps=100, prediction="x0"))
    config.data.normalizer, config.data.mean, config.data.std = "mean_std", (0.2,), (0.5,)
    _, loss, _ = ask(config, 8)
    x0 = (images_of(8) / 127.5 - 1 - 0.2) / 0.5
    assert loss == pytest.approx((x0**2).mean(), rel=1e-5)


def test_a_learned_variance_of_normalised_images_knows_black_and_white():
    settings = DiffusionConfig(num_timesteps=30, prediction="v", learned_variance=True)
    config = tiny(diffusion=settings)
    config.data.normalizer, config.data.mean, config.data.std = "mean_std", (0.2,), (0.5,)
    answer = np.random.default_rng(1).uniform(-1, 1, (16, SIZE, SIZE, 2)).astype(np.float32)
    call, loss, _ = ask(config, 16, answer=answer)
    settings.learned_variance = False
    _, simple, _ = ask(config, 16, answer=answer[..., :1])
    x0 = jnp.asarray((images_of(16) / 127.5 - 1 - 0.2) / 0.5, jnp.float32)
    output, variance_output = jnp.split(jnp.asarray(answer), 2, axis=-1)
    schedule, bounds = experiment.make_schedule(config), (-1.2 / 0.5, 0.8 / 0.5)
    added = diffusion.variance_loss(schedule, "v", output, variance_output, x0, call["x_t"], call["t"], bounds=bounds)
    assert loss == pytest.approx(simple + float(added.mean()), rel=1e-5)


def test_a_residual_u_net_trains_and_denoises_by_t():
    """The wrapper looks the level up: denoise_fn(x_t, t) is the network at 1 - alpha_bar_t."""
    config = continuous()
    config.model = ModelConfig(kind="residual_unet", base_channels=4, channel_mults=(1, 2), num_res_blocks=1)
    model, schedule = experiment.make_model(config), experiment.make_schedule(config)
    assert type(model) is models.ResidualUNet
    params = experiment.make_init_fn(config, model)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, params)
    keys = jax.random.split(jax.random.key(0), 4)
    loss, _ = objective.make_loss_fn(config, model, schedule)(params, {"image": jnp.asarray(images_of(4))}, keys)
    assert math.isfinite(loss)
    x_t, t = jax.random.normal(jax.random.key(1), (3, SIZE, SIZE, 1)), jnp.array([0, 50, 99])
    found = experiment.make_denoise_fn(model, params, schedule)(x_t, t)
    level = jnp.asarray(levels(np.asarray(t) / 99), jnp.float32)
    np.testing.assert_allclose(found, model.apply({"params": params}, x_t, level), rtol=1e-3, atol=1e-3)
