"""The variance of a reverse step: the fixed ones by Bayes' rule, the learned one between them, its loss and sampler."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import alpha_bars64, at, bayes, denoiser

from ddpm_jax import diffusion

T = 30
SCHEDULE = diffusion.make_schedule("linear", num_timesteps=T)
ALPHA_BARS = alpha_bars64("linear", T)
KEY = jax.random.key(0)
STEPS = [(29, 28), (29, 10), (15, 14), (3, 1), (1, 0)]
X_T = np.random.default_rng(0).normal(size=(4, 3, 2, 1)).astype(np.float32)


def log_variance(kind, t, t_prev, output=None):
    x = jnp.zeros((1, 1, 1, 1))
    output = None if output is None else jnp.full_like(x, output)
    return float(diffusion.model_log_variance(kind, SCHEDULE, x, jnp.int32(t), jnp.int32(t_prev), output).item())


@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_the_fixed_variances_and_what_lies_between(t, t_prev):
    small = math.log(bayes(ALPHA_BARS, 0.0, 0.0, t, t_prev)[1])
    large = math.log(1 - at(ALPHA_BARS, t) / at(ALPHA_BARS, t_prev))
    assert log_variance("fixed_small", t, t_prev) == pytest.approx(small, abs=1e-5)
    assert log_variance("fixed_large", t, t_prev) == pytest.approx(large, abs=1e-5)
    for output, v in ((-1.0, 0.0), (1.0, 1.0), (0.5, 0.75)):  # Nichol & Dhariwal 2021, eq. 15
        expected = v * large + (1 - v) * small
        assert log_variance("learned", t, t_prev, output) == pytest.approx(expected, abs=1e-5)


def test_to_clean_data_all_are_finite():
    small = math.log(bayes(ALPHA_BARS, 0.0, 0.0, 1, 0)[1])
    for t in (0, 5):
        assert log_variance("fixed_small", t, -1) == pytest.approx(small, abs=1e-5)
        assert log_variance("fixed_large", t, -1) == pytest.approx(small, abs=1e-5)
        assert log_variance("learned", t, -1, -1.0) == pytest.approx(small, abs=1e-5)
        assert log_variance("learned", t, -1, 1.0) == pytest.approx(math.log(1 - ALPHA_BARS[t]), abs=1e-4)


def test_a_network_without_a_variance_and_an_unknown_one_are_refused():
    with pytest.raises(ValueError, match=r"diffusion\.learned_variance"):
        log_variance("learned", 5, 4)
    with pytest.raises(ValueError, match="choose one of fixed_small, fixed_large, learned"):
        log_variance("large", 5, 4)
    with pytest.raises(ValueError, match=r"diffusion\.learned_variance"):
        diffusion.sample(lambda x, t: x, SCHEDULE, X_T, KEY, num_steps=5, method="ddpm", variance="learned")


def test_split_output():
    x = jnp.zeros((2, 3, 3, 3))
    output = jnp.arange(2 * 9 * 6.0).reshape(2, 3, 3, 6)
    prediction, variance_output = diffusion.split_output(output, x)
    np.testing.assert_array_equal(jnp.concatenate([prediction, variance_output], -1), output)
    assert diffusion.split_output(x, x)[1] is None
    for shape in ((2, 3, 3, 4), (1, 3, 3, 3), (2, 3, 3, 12)):
        with pytest.raises(ValueError, match="must be alike, or the output have twice"):
            diffusion.split_output(jnp.zeros(shape), x)


# Samplers


def with_variance(network, value):
    """The network with a second half of channels, all of one value."""

    def denoise(x_t, t):
        output = network(x_t, t)
        return jnp.concatenate([output, jnp.full_like(output, value)], axis=-1)

    return denoise


def test_the_sampler_at_both_ends_is_that_of_the_fixed_variances():
    network = denoiser("eps", ALPHA_BARS)

    def run(fn, variance):
        return diffusion.sample(fn, SCHEDULE, X_T, KEY, method="ddpm", num_steps=10, variance=variance)

    small, large = run(network, "fixed_small"), run(network, "fixed_large")
    np.testing.assert_allclose(run(with_variance(network, -1.0), "learned"), small, atol=1e-5)
    np.testing.assert_allclose(run(with_variance(network, 1.0), "learned"), large, atol=1e-5)
    between = run(with_variance(network, 0.0), "learned")
    assert float(jnp.abs(between - small).max()) > 1e-3
    assert float(jnp.abs(between - large).max()) > 1e-3


@pytest.mark.parametrize("method", diffusion.METHODS)
def test_every_method_leaves_a_variance_that_it_does_not_use_alone(method):
    network = denoiser("eps", ALPHA_BARS)
    run = lambda fn: diffusion.sample(fn, SCHEDULE, X_T, KEY, method=method, num_steps=5, spacing="trailing")  # noqa: E731
    np.testing.assert_array_equal(run(with_variance(network, 0.3)), run(network))
    invert = lambda fn: diffusion.invert(fn, SCHEDULE, X_T, num_steps=5, spacing="trailing")  # noqa: E731
    np.testing.assert_array_equal(invert(with_variance(network, 0.3)), invert(network))


def test_guidance_takes_the_variance_of_the_conditional_half():
    def network(x_t, t, label):
        of_label = (1.0 + label)[:, None, None, None]
        return jnp.concatenate([of_label * x_t, 10 * of_label + 0 * x_t], axis=-1)

    label = jnp.array([0, 2, 1, 0])
    output = diffusion.guided(network, label, 3, 2.5)(X_T, jnp.zeros(4, jnp.int32))
    mean, variance_output = diffusion.split_output(output, jnp.asarray(X_T))
    one = (1.0 + label)[:, None, None, None]
    np.testing.assert_allclose(mean, (4 + 2.5 * (one - 4)) * X_T, rtol=1e-5)
    np.testing.assert_allclose(variance_output, 10 * one + 0 * X_T)


# The loss


def arguments(prediction="eps"):
    x0 = jnp.asarray(np.round(np.tanh(X_T) * 127.5 + 127.5) / 127.5 - 1, jnp.float32)
    eps, output, variance_output = jax.random.normal(KEY, (3, *x0.shape))
    t = jnp.array([0, 1, 14, 29])
    return prediction, output, jnp.tanh(variance_output), x0, diffusion.q_sample(SCHEDULE, x0, t, eps), t


def test_the_loss_is_a_thousandth_of_the_chain_of_terms():
    prediction, output, variance_output, x0, x_t, t = arguments()
    x0_hat = diffusion.x0_from(prediction, SCHEDULE, output, x_t, t)
    log_variance = diffusion.model_log_variance("learned", SCHEDULE, x_t, t, t - 1, variance_output)
    expected = 0.001 * T * diffusion.step_term(SCHEDULE, x0, x0_hat, log_variance, t)
    np.testing.assert_allclose(diffusion.variance_loss(SCHEDULE, *arguments()), expected, rtol=1e-6)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_its_gradient_reaches_the_variance_half_alone(prediction):
    _, output, variance_output, *rest = arguments(prediction)

    def total(output, variance_output):
        return diffusion.variance_loss(SCHEDULE, prediction, output, variance_output, *rest).sum()

    by_output, by_variance = jax.grad(total, argnums=(0, 1))(output, variance_output)
    assert (by_output == 0).all()
    assert np.isfinite(by_variance).all()
    assert (np.abs(by_variance).max((1, 2, 3)) > 0).all()  # at t = 0 too
    h = 1e-2
    losses = lambda v: np.asarray(diffusion.variance_loss(SCHEDULE, prediction, output, v, *rest))  # noqa: E731
    along = h * jnp.sign(by_variance)
    slopes = (losses(variance_output + along) - losses(variance_output - along)) / (2 * h)
    np.testing.assert_allclose(np.abs(by_variance).sum((1, 2, 3)), slopes, rtol=0.02, atol=2e-6)


def test_the_best_variance_of_a_good_network_is_the_error_that_it_makes():
    """On Gaussian data the exact reverse variance is the posterior's plus what is unknown of x0: the loss finds it."""
    s, t = 0.5, 15
    ab, prev = ALPHA_BARS[t], ALPHA_BARS[t - 1]
    x0_variance = s**2 * (1 - ab) / (ab * s**2 + 1 - ab)
    beta = 1 - ab / prev
    exact = (math.sqrt(prev) * beta / (1 - ab)) ** 2 * x0_variance + (1 - prev) / (1 - ab) * beta
    x0, eps = jax.random.normal(KEY, (2, 1, 200, 200, 1)) * jnp.array([s, 1.0]).reshape(2, 1, 1, 1, 1)
    x_t = diffusion.q_sample(SCHEDULE, x0, jnp.array([t]), eps)
    output = denoiser("x0", ALPHA_BARS, 0.0, s)(x_t, jnp.array([t]))
    v = np.linspace(-1, 1, 81)
    loss = lambda one: diffusion.variance_loss(SCHEDULE, "x0", output, jnp.full_like(x0, one), x0, x_t, jnp.array([t]))  # noqa: E731
    losses = jax.lax.map(loss, jnp.asarray(v, jnp.float32))
    best = log_variance("learned", t, t - 1, float(v[int(np.argmin(losses))]))
    assert best == pytest.approx(math.log(exact), abs=0.02)
