"""Zero terminal SNR (Lin et al. 2023): alpha_bar_T = 0, where every formula must hold and none may divide by it."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import affine, alpha_bars64, bayes, betas64, chain, denoiser, noises

from ddpm_jax import diffusion
from ddpm_jax.diffusion.schedule import rates

T = 100
KEY = jax.random.key(3)
X_T = np.random.default_rng(0).normal(size=(4, 3, 2, 1)).astype(np.float32)


def rescaled64(name, num_timesteps):
    """Algorithm 1 on the float64 alpha-bars, in one line of its own."""
    signal = np.sqrt(alpha_bars64(name, num_timesteps))
    return np.interp(signal, [signal[-1], signal[0]], [0.0, signal[0]]) ** 2


def zero_snr(name="linear", num_timesteps=T):
    return diffusion.make_schedule(name, num_timesteps=num_timesteps, zero_snr=True)


@pytest.mark.parametrize("num_timesteps", [25, 1000])
@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_tables_are_algorithm_1(name, num_timesteps):
    schedule, alpha_bars = zero_snr(name, num_timesteps), rescaled64(name, num_timesteps)
    np.testing.assert_allclose(schedule.alpha_bars, alpha_bars, rtol=1e-6)
    np.testing.assert_allclose(schedule.noise_levels, 1 - alpha_bars, rtol=1e-6)
    assert all(np.isfinite(table).all() for table in schedule)
    assert [float(table[-1]) for table in schedule] == [1.0, 0.0, 1.0]
    assert float(schedule.betas[0]) == pytest.approx(betas64(name, num_timesteps)[0], rel=1e-6)  # the first is kept
    assert ((schedule.betas[:-1] > 0) & (schedule.betas[:-1] < 1)).all()


def test_betas_or_a_table_or_a_name_give_the_same():
    betas = betas64("linear", T)
    rescaled = diffusion.rescale_zero_snr(betas)
    assert rescaled.dtype == np.float64
    np.testing.assert_allclose(diffusion.rescale_zero_snr(rescaled), rescaled, rtol=1e-12)  # nothing left to shift
    for other in (
        diffusion.schedule_from_betas(rescaled),
        diffusion.make_schedule("table", num_timesteps=T, betas=tuple(betas), zero_snr=True),
        diffusion.make_schedule("table", num_timesteps=T, betas=rescaled),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other, zero_snr())


def test_a_chain_that_would_warn_ends_in_noise_afterwards():
    options = {"num_timesteps": 200, "scale_betas": False}
    with pytest.warns(diffusion.ScheduleWarning):
        diffusion.make_schedule("linear", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.make_schedule("linear", **options, zero_snr=True)


def test_one_timestep_cannot_be_both_the_first_and_the_last():
    with pytest.raises(ValueError, match=r"rescale_zero_snr=True: needs at least 2"):
        diffusion.rescale_zero_snr([0.5])


def test_conversions_at_pure_noise():
    """x_T is eps, and v is -x0."""
    schedule = zero_snr()
    x0, eps = np.random.default_rng(1).normal(size=(2, 5, 2, 2, 1)).astype(np.float32)
    t = jnp.full(5, T - 1)
    x_t = diffusion.q_sample(schedule, x0, t, eps)
    np.testing.assert_array_equal(x_t, eps)
    v = diffusion.target("v", schedule, x0, eps, t)
    np.testing.assert_array_equal(v, -x0)
    for prediction, output in (("v", v), ("x0", x0)):
        np.testing.assert_array_equal(diffusion.x0_from(prediction, schedule, output, x_t, t), x0)
        np.testing.assert_array_equal(diffusion.eps_from(prediction, schedule, output, x_t, t), eps)
        np.testing.assert_array_equal(diffusion.v_from(prediction, schedule, output, x_t, t), v)
    # eps is known already and says nothing of x0. Infinity would be clipped to a picture.
    assert np.isnan(diffusion.x0_from("eps", schedule, eps, x_t, t)).all()
    assert np.isnan(diffusion.v_from("eps", schedule, eps, x_t, t)).all()
    np.testing.assert_array_equal(diffusion.eps_from("eps", schedule, eps, x_t, t), eps)


@pytest.mark.parametrize("t_prev", [T - 2, 50, 0, -1])
def test_steps_from_pure_noise_are_bayes_rule(t_prev):
    schedule, alpha_bars = zero_snr(), rescaled64("linear", T)
    x0, x_t, noise = np.random.default_rng(1).normal(size=(3, 2, 2, 2, 1)).astype(np.float32)
    mean, variance = bayes(alpha_bars, x0.astype(np.float64), x_t, T - 1, t_prev)
    found = diffusion.posterior(schedule, x0, x_t, T - 1, t_prev)
    np.testing.assert_allclose(found[0], mean, atol=1e-6)
    np.testing.assert_allclose(found[1].item(), variance, rtol=1e-6)
    assert np.isfinite(found[2]).all()
    prev = alpha_bars[t_prev] if t_prev >= 0 else 1.0
    for scale, variance_name in ((1 - prev, "fixed_small"), (float(t_prev >= 0), "fixed_large")):
        x_prev = diffusion.ddpm_step(schedule, x0, x_t, T - 1, t_prev, noise, variance=variance_name)
        np.testing.assert_allclose(x_prev, mean + math.sqrt(scale) * noise, atol=1e-6)
    for eta in (0.0, 0.5, 1.0):
        x_prev = diffusion.ddim_step(schedule, x0, x_t, T - 1, t_prev, noise, eta=eta)
        rest = math.sqrt(1 - prev) * (math.sqrt(1 - eta**2) * x_t + eta * noise)
        np.testing.assert_allclose(x_prev, math.sqrt(prev) * x0 + rest, atol=1e-6)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_chains_are_the_float64_recursion(prediction, spacing, clip):
    alpha_bars = rescaled64("linear", T)
    network, coefficients = denoiser(prediction, alpha_bars), affine(prediction, alpha_bars, 0.3, 0.5)
    plan = diffusion.timestep_plan(T, 10, spacing)
    assert plan[0][0] == T - 1
    noise = noises(KEY, plan[0], X_T.shape)
    for method, eta, variance in (
        *(("ddim", eta, "fixed_small") for eta in (0.0, 0.5, 1.0)),
        ("ddpm", 0.0, "fixed_small"),
        ("ddpm", 0.0, "fixed_large"),
    ):
        options = {"method": method, "variance": variance, "prediction": prediction, "eta": eta}
        found = diffusion.sample(network, zero_snr(), X_T, KEY, plan=plan, clip_x0=clip or False, **options)
        expected, _, _ = chain(alpha_bars, X_T, plan, noise, coefficients, clip=clip, **options)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_deterministic_chain_forgets_the_prior_mean():
    """Of a mean of .3 it keeps .2990 where sqrt(alpha_bar_T) = .006, however many the steps: this is the cure."""
    means = {}
    for zero in (False, True):
        schedule = diffusion.make_schedule("linear", zero_snr=zero)
        network = denoiser("v", np.asarray(schedule.alpha_bars, np.float64))
        plan = diffusion.timestep_plan(1000, 1000, "trailing")
        x0 = diffusion.sample(network, schedule, X_T, KEY, plan=plan, prediction="v", clip_x0=False)
        means[zero] = np.polyfit(X_T.ravel(), np.asarray(x0).ravel(), 1)[1]
    assert means[False] == pytest.approx(0.2990, abs=6e-5)
    assert means[True] == pytest.approx(0.3, abs=6e-5)


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("kind", diffusion.WEIGHTS)
def test_weights_are_finite(kind, prediction):
    assert np.isfinite(diffusion.weight(kind, prediction, zero_snr(), jnp.arange(T))).all()


def test_rates_at_pure_noise():
    found = rates(zero_snr(), jnp.array([T - 1]), jnp.zeros((1, 1)))
    assert (found.signal.item(), found.noise.item()) == (0.0, 1.0)
