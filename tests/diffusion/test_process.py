import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import alpha_bars64, at, bayes
from scipy import stats

from ddpm_jax import diffusion

CONVERT = {"x0": diffusion.x0_from, "eps": diffusion.eps_from, "v": diffusion.v_from}
STEPS = [
    (0, -1),
    (1, 0),
    (2, 1),
    (500, 499),
    (999, 998),
    (999, -1),
    (500, -1),
    (999, 0),
    (700, 3),
    (300, 250),
    (999, 900),
]


def images(seed, shape=(5, 2, 3, 2)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_q_sample_is_equation_4(name):
    schedule, alpha_bars = diffusion.make_schedule(name), alpha_bars64(name, 1000)
    x0, eps, t = images(0), images(1), np.array([0, 1, 300, 998, 999])
    ab = alpha_bars[t].reshape(-1, 1, 1, 1)
    expected = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * eps
    np.testing.assert_allclose(diffusion.q_sample(schedule, x0, jnp.asarray(t), eps), expected, atol=1e-6)
    for i, one in enumerate(t):  # one t for the batch is the same number for every row
        np.testing.assert_allclose(diffusion.q_sample(schedule, x0, one, eps)[i], expected[i], atol=1e-6)


def test_q_sample_is_the_markov_chain_of_equation_2():
    """Mean and variance of 20 single steps x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z, and of one q_sample."""
    schedule = diffusion.make_schedule("linear", num_timesteps=50)
    mean, variance = 0.8, 0.0
    for beta in np.asarray(schedule.betas[:20], np.float64):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    eps = jax.random.normal(jax.random.key(0), (1, 200, 200, 1))
    x_t = np.asarray(diffusion.q_sample(schedule, jnp.full_like(eps, 0.8), 19, eps), np.float64).ravel()
    assert stats.kstest((x_t - mean) / math.sqrt(variance), "norm").pvalue > 0.01
    assert stats.kstest((x_t - mean) / math.sqrt(variance) * 1.03, "norm").pvalue < 0.01  # the test has the power


def test_q_sample_of_data_with_unit_variance_keeps_it():
    schedule = diffusion.make_schedule("cosine")
    x0, eps = jax.random.normal(jax.random.key(0), (2, 4, 100, 100, 1))
    x_t = diffusion.q_sample(schedule, x0, jnp.array([0, 300, 700, 999]), eps)
    np.testing.assert_allclose(x_t.var((1, 2, 3)), 1.0, atol=5 * math.sqrt(2 / 10_000))


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_posterior_is_bayes_rule(name, t, t_prev):
    schedule, alpha_bars = diffusion.make_schedule(name), alpha_bars64(name, 1000)
    x0, x_t = images(0), images(1)
    expected_mean, expected_variance = bayes(alpha_bars, x0.astype(np.float64), x_t, t, t_prev)
    mean, variance, log_variance = diffusion.posterior(schedule, x0, x_t, jnp.int32(t), jnp.int32(t_prev))
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-5)
    assert mean.dtype == variance.dtype == log_variance.dtype == jnp.float32
    np.testing.assert_allclose(np.broadcast_to(variance, x0.shape), expected_variance, rtol=2e-5)
    assert np.isfinite(log_variance).all()
    if t_prev >= 0:
        np.testing.assert_allclose(log_variance.ravel(), math.log(expected_variance), atol=2e-5)


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_posterior_of_a_batch_of_steps_is_each_row_by_itself(name):
    schedule = diffusion.make_schedule(name)
    x0, x_t = images(0, (len(STEPS), 2, 2, 1)), images(1, (len(STEPS), 2, 2, 1))
    t, t_prev = jnp.array(STEPS).T
    batch = diffusion.posterior(schedule, x0, x_t, t, t_prev)
    assert batch[1].shape == batch[2].shape == (len(STEPS), 1, 1, 1)
    for i, (one, one_prev) in enumerate(STEPS):
        alone = diffusion.posterior(schedule, x0[i : i + 1], x_t[i : i + 1], one, one_prev)
        for a, b in zip(batch, alone, strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, rtol=1e-6, atol=1e-6)


def test_posterior_mean_at_clean_data_is_x0_itself():
    x0, x_t = images(0), images(1)
    for name, t in itertools.product(diffusion.SCHEDULES, (0, 300, 999)):
        mean, variance, _ = diffusion.posterior(diffusion.make_schedule(name), x0, x_t, t, -1)
        np.testing.assert_allclose(mean, x0, rtol=1e-6)
        assert (variance == 0).all()


def test_posterior_variance_and_its_clipped_logarithm_as_published():  # peers.md 4.2
    schedule, zeros = diffusion.make_schedule("linear"), jnp.zeros((1, 1, 1, 1))
    _, variance, log_variance = diffusion.posterior(schedule, zeros, zeros, 1, 0)
    assert float(variance.item()) == pytest.approx(5.45e-5, rel=1e-3)
    for t in (0, 999):
        clipped = diffusion.posterior(schedule, zeros, zeros, t, -1)[2].item()
        assert clipped == pytest.approx(-9.82, abs=0.005)
        assert clipped == pytest.approx(log_variance.item(), abs=1e-6)


def test_posterior_mixed_over_x0_gives_back_the_marginal():
    """q(x_prev) from q(x_prev | x_t, x0) with x_t and x0 drawn: the law of total variance, for data N(0, s^2)."""
    schedule, alpha_bars, s2 = diffusion.make_schedule("cosine", num_timesteps=100), alpha_bars64("cosine", 100), 0.3
    for t, t_prev in ((60, 59), (80, 30), (40, -1)):
        one = jnp.ones((1, 1))
        from_x0, variance, _ = diffusion.posterior(schedule, one, 0 * one, t, t_prev)
        from_xt, _, _ = diffusion.posterior(schedule, 0 * one, one, t, t_prev)
        a, b, now, prev = from_x0.item(), from_xt.item(), alpha_bars[t], at(alpha_bars, t_prev)
        covariance = math.sqrt(now) * s2
        total = a * a * s2 + b * b * (now * s2 + 1 - now) + 2 * a * b * covariance + variance.item()
        assert total == pytest.approx(prev * s2 + 1 - prev, rel=1e-5)
        assert a * s2 + b * covariance == pytest.approx(math.sqrt(prev) * s2, rel=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("given", diffusion.PREDICTIONS)
def test_conversions_are_the_definitions(name, given):
    t = np.array([0, 10, 300, 700, 950])
    schedule, ab = diffusion.make_schedule(name), alpha_bars64(name, 1000)[t].reshape(-1, 1, 1, 1)
    x0, eps = images(0).astype(np.float64), images(1).astype(np.float64)
    x_t = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * eps
    truth = {"x0": x0, "eps": eps, "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0}
    args = schedule, jnp.asarray(truth[given], jnp.float32), jnp.asarray(x_t, jnp.float32), jnp.asarray(t)
    for wanted, convert in CONVERT.items():
        # One division by the smaller rate magnifies the rounding of the inputs.
        worst = 1 / np.minimum(np.sqrt(ab), np.sqrt(1 - ab)) if wanted != given else 1 + 0 * ab
        error = np.abs(np.asarray(convert(given, *args)) - truth[wanted])
        assert (error < 1e-6 * worst).all(), (wanted, error.max())


@pytest.mark.parametrize(("start", "middle"), list(itertools.product(diffusion.PREDICTIONS, repeat=2)))
def test_conversions_there_and_back(start, middle):
    schedule, x_t, output = diffusion.make_schedule("linear"), images(2), images(3)
    t = jnp.array([5, 60, 250, 500, 800])
    there = CONVERT[middle](start, schedule, output, x_t, t)
    back = CONVERT[start](middle, schedule, there, x_t, t)
    np.testing.assert_allclose(back, output, atol=2e-5)
    for end, convert in CONVERT.items():  # by way of the middle, or straight
        straight = convert(start, schedule, output, x_t, t)
        np.testing.assert_allclose(
            convert(middle, schedule, there, x_t, t), straight, rtol=1e-4, atol=1e-4, err_msg=end
        )


def test_conversions_take_one_t_and_refuse_an_unknown_prediction():
    schedule, x_t, output = diffusion.make_schedule("linear"), images(2), images(3)
    for convert in CONVERT.values():
        for given in diffusion.PREDICTIONS:
            one, many = (convert(given, schedule, output, x_t, t) for t in (jnp.int32(7), jnp.full(5, 7)))
            np.testing.assert_allclose(one, many, rtol=1e-6)
        with pytest.raises(ValueError, match=r"'epsilon': choose one of eps, x0, v"):
            convert("epsilon", schedule, output, x_t, 7)


def test_a_timestep_outside_the_table_is_nan_and_not_the_nearest():
    schedule, x0 = diffusion.make_schedule("linear", num_timesteps=50), images(0)
    for t in (50, 1000, -2, -50):
        assert np.isnan(diffusion.q_sample(schedule, x0, t, x0)).all()
        assert np.isnan(diffusion.posterior(schedule, x0, x0, t, -1)[0]).all()
