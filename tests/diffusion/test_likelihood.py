"""The variational bound on Gaussian data with the exact denoiser: closed forms, quadrature, and the data's entropy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import affine, alpha_bars64, at, bayes, denoiser
from scipy import integrate, stats

from ddpm_jax import diffusion

T, MU, STD = 30, 0.2, 0.3
SCHEDULE = diffusion.make_schedule("linear", num_timesteps=T)
ALPHA_BARS = alpha_bars64("linear", T)
KEY = jax.random.key(1)
LEVELS = np.linspace(-1, 1, 256)

decoder_term = jax.jit(diffusion.decoder_term, static_argnames="num_levels")


def kl64(mean, variance, other_mean, other_variance):
    """KL(N(mean, variance) || N(other_mean, other_variance)) in bits, from the definition by quadrature."""
    p, q = stats.norm(mean, math.sqrt(variance)), stats.norm(other_mean, math.sqrt(other_variance))
    reach = 12 * math.sqrt(variance)
    value, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean - reach, mean + reach, epsabs=1e-12, limit=200
    )
    return value / math.log(2)


def test_prior_term_is_the_kl_from_a_standard_normal():
    x0 = np.array([-1, -0.3, 0.0, 0.8], np.float32)
    for name, num_timesteps in (("linear", 30), ("linear", 1000), ("offset_cosine", 1000)):
        schedule, ab = diffusion.make_schedule(name, num_timesteps=num_timesteps), alpha_bars64(name, num_timesteps)[-1]
        expected = [0.5 * (ab * x**2 - ab - math.log1p(-ab)) / math.log(2) for x in x0.astype(np.float64)]
        found = diffusion.prior_term(schedule, jnp.asarray(x0).reshape(4, 1, 1, 1))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-10)
    assert found[3] == pytest.approx(kl64(math.sqrt(ab) * 0.8, 1 - ab, 0, 1), rel=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_step_term_is_the_kl_of_two_gaussians_by_quadrature(variance):
    for t in (1, 2, 15, 29):
        for x0, x0_hat, x_t in ((0.3, 0.31, -0.4), (-1.0, 0.2, 1.3)):
            image, guess = (jnp.full((1, 1, 1, 1), x, jnp.float32) for x in (x0, x0_hat))
            output = jnp.full_like(image, 0.4)
            log_variance = diffusion.model_log_variance(variance, SCHEDULE, image, t, t - 1, output)
            mean, true_variance = bayes(ALPHA_BARS, x0, x_t, t, t - 1)
            model_mean, small = bayes(ALPHA_BARS, x0_hat, x_t, t, t - 1)
            large = 1 - at(ALPHA_BARS, t) / at(ALPHA_BARS, t - 1)
            model_variance = {"fixed_small": small, "fixed_large": large, "learned": large**0.7 * small**0.3}[variance]
            expected = kl64(mean, true_variance, model_mean, model_variance)
            found = diffusion.step_term(SCHEDULE, image, guess, log_variance, jnp.array([t])).item()
            assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("std", [0.002, 0.0075, 0.05, 1.0])
def test_decoder_term_is_the_probability_of_the_bin_by_quadrature(std):
    half = 1 / 255
    for level in (0, 1, 100, 254, 255):
        for mean in (-1.02, LEVELS[level] + 0.4 * half, LEVELS[level] - 6 * std, 0.5):
            lower = -np.inf if level == 0 else LEVELS[level] - half
            upper = np.inf if level == 255 else LEVELS[level] + half
            if min(abs(lower - mean), abs(upper - mean)) > 30 * std:
                continue  # beyond the reach of float64
            p = stats.norm(mean, std)
            probability, _ = integrate.quad(
                p.pdf, *np.clip([lower, upper], mean - 38 * std, mean + 38 * std), points=None, epsabs=0
            )
            x0, mu = (jnp.full((1, 1, 1, 1), x, jnp.float32) for x in (LEVELS[level], mean))
            found = decoder_term(x0, mu, jnp.full_like(x0, 2 * math.log(std))).item()
            assert found == pytest.approx(-math.log2(probability), rel=2e-3, abs=2e-5), (level, mean)


def test_decoder_probabilities_of_all_levels_add_up_to_one_in_any_units():
    mean, log_variance = jnp.full((256, 1, 1, 1), 0.123), jnp.full((256, 1, 1, 1), -6.0)
    for shift, scale, num_levels in ((0.0, 1.0, 256), (0.7, 3.0, 256), (0.0, 1.0, 16)):
        levels = np.linspace(-1, 1, num_levels).reshape(-1, 1, 1, 1).astype(np.float32)
        found = decoder_term(
            shift + scale * levels,
            shift + scale * mean[:num_levels],
            log_variance[:num_levels] + 2 * math.log(scale),
            bounds=(shift - scale, shift + scale),
            num_levels=num_levels,
        )
        assert float((2.0**-found).sum()) == pytest.approx(1, abs=1e-5)


def test_decoder_term_and_its_gradient_are_finite_far_away():
    x0 = jnp.array([-1.0, -0.2, 0.5, 1.0]).reshape(4, 1, 1, 1)
    for mean in (-20.0, 0.5, 20.0):
        for log_variance in (-20.0, -9.82, 0.0, 3.0):
            term = lambda m, v: diffusion.decoder_term(x0, m, v).sum()  # noqa: E731
            value, gradients = jax.value_and_grad(term, argnums=(0, 1))(
                jnp.full_like(x0, mean), jnp.full_like(x0, log_variance)
            )
            assert np.isfinite(value)
            assert all(np.isfinite(g).all() for g in gradients)


def expected_terms(x0, variance):
    """Bits of each t > 0 for a pixel x0: the exact network's mean squared error, over eps, in closed form."""
    a, b = affine("x0", ALPHA_BARS, MU, STD)
    found = []
    for t in range(1, T):
        ab, prev = ALPHA_BARS[t], ALPHA_BARS[t - 1]
        beta = 1 - ab / prev
        small = (1 - prev) / (1 - ab) * beta
        error = (x0 * (1 - a[t] * math.sqrt(ab)) - b[t]) ** 2 + a[t] ** 2 * (1 - ab)
        model = small if variance == "fixed_small" else beta
        mean_term = prev * beta**2 / (1 - ab) ** 2 * error / model
        found.append(0.5 * (small / model - 1 - math.log(small / model) + mean_term) / math.log(2))
    return found


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_every_term_on_gaussian_data_against_its_closed_form(variance, prediction):
    pixels = np.array([LEVELS[150], LEVELS[40]], np.float32)
    x0 = np.broadcast_to(pixels.reshape(2, 1, 1, 1), (2, 150, 150, 1))
    bound = diffusion.variational_bound(
        denoiser(prediction, ALPHA_BARS, MU, STD),
        SCHEDULE,
        x0,
        KEY,
        variance=variance,
        prediction=prediction,
        clip_x0=False,
    )
    assert bound.prior.shape == (2,)
    assert bound.per_step.shape == (T, 2)
    for i, pixel in enumerate(pixels.astype(np.float64)):
        np.testing.assert_allclose(bound.per_step[1:, i], expected_terms(pixel, variance), rtol=0.05)
    np.testing.assert_allclose(bound.total, bound.prior + bound.per_step.sum(0), rtol=1e-6)


def test_decoder_term_of_the_bound_is_the_quadrature_over_eps():
    a, b = affine("x0", ALPHA_BARS, MU, STD)
    pixel, ab = LEVELS[150], ALPHA_BARS[0]
    std = math.sqrt((1 - ALPHA_BARS[0]) / (1 - ALPHA_BARS[1]) * (1 - ALPHA_BARS[1] / ALPHA_BARS[0]))

    def bits(eps):
        mean = a[0] * (math.sqrt(ab) * pixel + math.sqrt(1 - ab) * eps) + b[0]
        p = stats.norm(mean, std)
        return -math.log2(p.cdf(pixel + 1 / 255) - p.cdf(pixel - 1 / 255)) * stats.norm.pdf(eps)

    expected, _ = integrate.quad(bits, -6, 6)
    x0 = np.full((1, 150, 150, 1), pixel, np.float32)
    bound = diffusion.variational_bound(denoiser("eps", ALPHA_BARS, MU, STD), SCHEDULE, x0, KEY, clip_x0=False)
    assert bound.per_step[0].item() == pytest.approx(expected, rel=0.02)


def exact_reverse(x_t, t):
    """The exact eps, and the exact variance of x_{t-1} given x_t: for Gaussian data the reverse chain is Gaussian."""
    ab, prev = ALPHA_BARS, np.append(1.0, ALPHA_BARS[:-1])
    beta = 1 - ab / prev
    small = (1 - prev) / (1 - ab) * beta
    of_x0 = STD**2 * (1 - ab) / (ab * STD**2 + 1 - ab)  # what x_t leaves unknown of x0
    exact = np.log(small + prev * (beta / (1 - ab)) ** 2 * of_x0)
    small[0] = small[1]
    v = (exact - np.log(small)) / (np.log(beta) - np.log(small))
    variance_output = jnp.asarray(2 * v - 1, jnp.float32)[t][:, None, None, None]
    output = denoiser("eps", ALPHA_BARS, MU, STD)(x_t, t)
    return jnp.concatenate([output, variance_output + 0 * output], -1)


def test_the_bound_of_the_exact_reverse_chain_is_the_entropy_of_the_data():
    """-log2 p of N(MU, STD^2) rounded to the levels is known; only the exact variances reach it."""
    x0 = MU + STD * np.random.default_rng(0).normal(size=(1, 200, 200, 1))
    index = np.clip(np.round((x0 + 1) * 127.5), 0, 255).astype(int)
    p = stats.norm(MU, STD)
    edges = np.concatenate([[-np.inf], LEVELS[:-1] + 1 / 255, [np.inf]])
    entropy = -np.log2(p.cdf(edges[index + 1]) - p.cdf(edges[index])).mean()
    x0 = LEVELS[index].astype(np.float32)
    gaps = {}
    for variance in diffusion.VARIANCES:
        bound = diffusion.variational_bound(exact_reverse, SCHEDULE, x0, KEY, variance=variance, clip_x0=False)
        gaps[variance] = bound.total.item() - entropy
    assert gaps["learned"] == pytest.approx(0, abs=0.01)
    assert gaps["fixed_small"] > 0.05
    assert gaps["fixed_large"] > 0.05


def test_chunks_keys_and_listeners_change_nothing():
    network = denoiser("eps", ALPHA_BARS, MU, STD)
    x0 = np.random.default_rng(0).choice(LEVELS, (4, 3, 2, 1)).astype(np.float32)
    keys = jax.random.split(KEY, 4)
    run = lambda x0, keys, **options: diffusion.variational_bound(network, SCHEDULE, x0, keys, **options)  # noqa: E731
    whole, heard = run(x0, keys), []
    again = run(x0, keys, chunk=7, on_step=heard.append)
    np.testing.assert_allclose(again.per_step, whole.per_step, rtol=1e-4, atol=1e-5)
    assert heard == [0, 1, 2, 3, 4]
    part = run(x0[1:3], keys[1:3])  # an image's bound depends on itself and its key
    np.testing.assert_allclose(part.per_step, whole.per_step[:, 1:3], rtol=1e-4, atol=1e-5)


def test_a_learned_variance_at_its_ends_is_the_fixed_one():
    network, x0 = denoiser("eps", ALPHA_BARS, MU, STD), np.full((2, 3, 2, 1), LEVELS[90], np.float32)

    def learned(x_t, t):
        output = network(x_t, t)
        return jnp.concatenate([output, -jnp.ones_like(output)], -1)

    fixed = diffusion.variational_bound(network, SCHEDULE, x0, KEY)
    found = diffusion.variational_bound(learned, SCHEDULE, x0, KEY, variance="learned")
    np.testing.assert_allclose(found.per_step, fixed.per_step, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_refused():
    x0 = jnp.zeros((2, 3, 2, 1))
    for options, message in (
        ({"variance": "large"}, "choose one of fixed_small"),
        ({"variance": "learned"}, r"diffusion\.learned_variance"),
        ({"prediction": "noise"}, "'noise': choose one of"),
        ({"chunk": 0}, r"chunk=0: must lie in 1 \.\. 30"),
        ({"chunk": 31}, "chunk=31"),
        ({"key": jax.random.split(KEY, 3)}, "give one key, or 2 keys"),
    ):
        options = {"key": KEY} | options
        with pytest.raises(ValueError, match=message):
            diffusion.variational_bound(lambda x, t: x, SCHEDULE, x0, **options)
