"""DPM-Solver++ 2M and Heun: order of convergence on Gaussian data, closed forms, a peer, and both ends of the chain."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import affine, alpha_bars64, at, denoiser

from ddpm_jax import diffusion

MU, STD = 0.3, 0.5
KEY = jax.random.key(3)
X_T = np.random.default_rng(0).normal(size=(4, 3, 2, 1)).astype(np.float32)
ALPHA_BARS = alpha_bars64("linear", 1000)
SECOND_ORDER = ("dpm++", "heun")

make_schedule = functools.cache(diffusion.make_schedule)


def flow(x, t, t_prev):
    """The probability flow of N(MU, STD^2), exactly: it keeps each level's standard score."""
    now, prev = at(ALPHA_BARS, t), at(ALPHA_BARS, t_prev)
    score = (x - math.sqrt(now) * MU) / math.sqrt(now * STD**2 + 1 - now)
    return math.sqrt(prev) * MU + math.sqrt(prev * STD**2 + 1 - prev) * score


def run(method, plan, prediction="eps", **options):
    network = denoiser(prediction, ALPHA_BARS, MU, STD)
    options = {"clip_x0": False, "prediction": prediction} | options
    return np.asarray(
        diffusion.sample(network, make_schedule("linear"), X_T, KEY, method=method, plan=plan, **options), np.float64
    )


def ladder(start, stop, num_steps):
    levels = np.linspace(start, stop, num_steps + 1).round().astype(int)
    return levels[:-1], levels[1:]


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize(("method", "factor"), [("ddim", 2), ("dpm++", 4), ("heun", 4)])
def test_error_falls_by_the_order_of_the_method(method, factor, prediction):
    """From t = 960 to 160 in steps of 800 / n: the error of a second-order method falls by 4 when n doubles."""
    limit = flow(X_T.astype(np.float64), 960, 160)
    errors = [np.abs(run(method, ladder(960, 160, n), prediction) - limit).max() for n in (10, 20, 40)]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert errors[-1] > 2e-6  # above float32's rounding
    assert ((ratios > 0.85 * factor) & (ratios < 1.2 * factor)).all(), (errors, ratios)


@pytest.mark.parametrize("num_steps", [10, 20, 40])
@pytest.mark.parametrize("method", SECOND_ORDER)
def test_to_clean_data_both_beat_ddim(method, num_steps):
    limit = flow(X_T.astype(np.float64), 999, -1)
    plan = diffusion.timestep_plan(1000, num_steps, "trailing")
    first, second = (np.abs(run(m, plan) - limit).max() for m in ("ddim", method))
    assert second < 0.8 * first


def chain64(method, plan, bound=np.inf):
    """The papers' formulas in lambda = log(alpha / sigma), in float64; steps to clean data by their limit.

    Each guess is clipped to [-bound, bound].
    """
    a, b = affine("x0", ALPHA_BARS, MU, STD)
    guess = lambda x, t: np.clip(a[t] * x + b[t], -bound, bound)  # noqa: E731
    x, last = X_T.astype(np.float64), None
    for t, t_prev in zip(*plan, strict=True):
        alpha, sigma = math.sqrt(ALPHA_BARS[t]), math.sqrt(1 - ALPHA_BARS[t])
        x0_hat = guess(x, t)
        if t_prev == -1:
            return x0_hat
        alpha_prev, sigma_prev = math.sqrt(ALPHA_BARS[t_prev]), math.sqrt(1 - ALPHA_BARS[t_prev])
        lambda_t = math.log(alpha / sigma)
        h = math.log(alpha_prev / sigma_prev) - lambda_t
        step = lambda d: sigma_prev / sigma * x - alpha_prev * math.expm1(-h) * d  # noqa: B023, E731
        data = x0_hat
        if method == "dpm++" and last is not None:
            r = (lambda_t - last[0]) / h
            data = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * last[1]
        if method == "heun":
            data = (x0_hat + guess(step(x0_hat), t_prev)) / 2
        x, last = step(data), (lambda_t, x0_hat)
    return x


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_a_chain_is_the_papers_recursion_in_log_snr(method):
    for plan in (diffusion.timestep_plan(1000, 12, "trailing"), diffusion.timestep_plan(1000, 30, "quadratic")):
        assert np.abs(run(method, plan) - chain64(method, plan)).max() < 5e-6


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_every_guess_is_clipped(method):
    plan = diffusion.timestep_plan(1000, 12, "trailing")
    clipped = chain64(method, plan, 0.1)
    assert np.abs(clipped - np.clip(chain64(method, plan), -0.1, 0.1)).max() > 0.01  # not only the last one
    assert np.abs(run(method, plan, clip_x0=(-0.1, 0.1)) - clipped).max() < 5e-6


def test_exponential_step_is_ddim():
    schedule = make_schedule("cosine")
    x0, eps = np.random.default_rng(1).normal(size=(2, 5, 2, 2, 1)).astype(np.float32)
    t, t_prev = jnp.array([999, 999, 500, 3, 20]), jnp.array([-1, 700, 499, 2, -1])
    x_t = diffusion.q_sample(schedule, x0, t, eps)
    found = diffusion.exponential_step(schedule, x0, x_t, t, t_prev)
    np.testing.assert_allclose(found, diffusion.ddim_step(schedule, x0, eps, t, t_prev, 0 * eps), atol=2e-6)
    np.testing.assert_allclose(found[0], x0[0], atol=1e-6)


def test_dpmpp_is_that_of_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    t, t_prev = diffusion.timestep_plan(1000, 20, "trailing")
    peer = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, final_sigmas_type="zero", lower_order_final=False, solver_order=2
    )
    peer.set_timesteps(timesteps=t.tolist())
    a, b = affine("eps", ALPHA_BARS, MU, STD)
    x = torch.from_numpy(X_T.astype(np.float64))
    for step in t:
        x = peer.step(a[step] * x + b[step], int(step), x).prev_sample
    np.testing.assert_allclose(run("dpm++", (t, t_prev)), x.numpy(), atol=2e-5)


# Both ends of the chain


def terminal_schedule():
    """A cosine schedule whose last level is pure noise: alpha_bar_T = 0."""
    schedule = diffusion.make_schedule("cosine", num_timesteps=50)
    return schedule._replace(
        betas=schedule.betas.at[-1].set(1.0),
        alpha_bars=schedule.alpha_bars.at[-1].set(0.0),
        noise_levels=schedule.noise_levels.at[-1].set(1.0),
    )


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("method", diffusion.METHODS)
def test_every_method_begins_at_pure_noise_and_ends_at_clean_data(method, prediction):
    schedule = terminal_schedule()
    alpha_bars = np.asarray(schedule.alpha_bars, np.float64)
    network = denoiser(prediction, alpha_bars, MU, STD)
    x_T = jax.random.normal(jax.random.key(0), (1, 64, 64, 1))
    for num_steps in (1, 2, 3, 25):
        x0 = diffusion.sample(
            network,
            schedule,
            x_T,
            KEY,
            method=method,
            num_steps=num_steps,
            spacing="trailing",
            prediction=prediction,
            clip_x0=False,
        )
        assert np.isfinite(x0).all()
        assert float(x0.mean()) == pytest.approx(MU, abs=0.05)
        if num_steps == 25:
            assert float(x0.std()) == pytest.approx(STD, abs=0.06)
        elif num_steps == 1:
            np.testing.assert_allclose(x0, MU, atol=1e-5)  # pure noise says nothing: the mean of the data


def test_eps_says_nothing_where_there_is_no_signal():
    schedule, network = terminal_schedule(), lambda x_t, t: 0.1 * x_t
    with pytest.raises(ValueError, match=r"prediction='eps': the chain starts at t = 49, .*v or x0"):
        diffusion.sample(network, schedule, X_T, KEY, num_steps=5, spacing="trailing")
    x0 = diffusion.sample(network, schedule, X_T, KEY, plan=ladder(48, -1, 5))
    assert np.isfinite(x0).all()


def test_heun_on_a_plan_that_comes_to_clean_data_midway_tells_the_network_no_level_below_zero():
    seen = []

    def network(x_t, t):
        jax.debug.callback(lambda t: seen.append(int(t[0])), t)
        return 0.1 * x_t

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffusion.ScheduleWarning)
        x0 = diffusion.sample(
            network, make_schedule("linear"), X_T, KEY, method="heun", plan=([900, 500, 300], [500, -1, 100])
        )
    jax.effects_barrier()
    assert np.isfinite(x0).all()
    assert sorted(seen) == [100, 300, 500, 500, 900]  # a chain that ends at a level calls the network there too


def test_heun_has_a_gradient():
    def total(x_T):
        return diffusion.sample(
            denoiser("eps", ALPHA_BARS, MU, STD),
            make_schedule("linear"),
            x_T,
            KEY,
            method="heun",
            plan=ladder(960, -1, 6),
            clip_x0=False,
        ).sum()

    gradient, h = np.asarray(jax.grad(total)(jnp.asarray(X_T))), 0.1  # the chain is affine in x_T
    step = np.zeros_like(X_T)
    step[0, 0, 0, 0] = h
    assert gradient[0, 0, 0, 0] == pytest.approx(float(total(X_T + step) - total(X_T - step)) / (2 * h), rel=1e-3)
