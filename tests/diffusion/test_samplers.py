import functools
import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import affine, alpha_bars64, at, bayes, chain, denoiser, noises
from jax.tree_util import Partial

from ddpm_jax import diffusion
from ddpm_jax.diffusion import listening, samplers

MU, STD = 0.3, 0.5
KEY = jax.random.key(3)
X_T = np.random.default_rng(0).normal(size=(4, 3, 2, 1)).astype(np.float32)
METHODS = [("ddim", "fixed_small"), ("ddpm", "fixed_small"), ("ddpm", "fixed_large")]

make_schedule = functools.cache(diffusion.make_schedule)


def plan_of(T, S, spacing="trailing"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffusion.ScheduleWarning)
        return diffusion.timestep_plan(T, S, spacing)


def exact(name="linear", T=1000, prediction="eps"):
    """The schedule, its float64 alpha-bars, and the exact network of N(MU, STD^2) with its float64 coefficients."""
    alpha_bars = alpha_bars64(name, T)
    network = denoiser(prediction, alpha_bars, MU, STD)
    return make_schedule(name, num_timesteps=T), alpha_bars, network, affine(prediction, alpha_bars, MU, STD)


def curved(x_t, t):
    """A network of nobody's data: not affine, of either sign, and large enough for clipping to matter."""
    return jnp.tanh(2 * x_t) + 0.1 * jnp.cos(t / 100).reshape(-1, 1, 1, 1)


def fading(x_t, t):
    return 0.2 * x_t


def assert_close(found, expected, atol):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=atol)


# One step


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_one_step_of_each_method_between_any_two_levels(name):
    schedule, alpha_bars = make_schedule(name), alpha_bars64(name, 1000)
    steps = np.array([(0, -1), (1, 0), (500, 499), (999, 998), (999, -1), (999, 0), (700, 3), (300, 250), (999, 900)])
    x0, eps, noise = np.random.default_rng(1).normal(size=(3, len(steps), 2, 2, 1)).astype(np.float32)
    t, t_prev = jnp.asarray(steps.T)
    x_t = diffusion.q_sample(schedule, x0, t, eps)
    small, large = (
        diffusion.ddpm_step(schedule, x0, x_t, t, t_prev, noise, variance=v) for v in ("fixed_small", "fixed_large")
    )
    ddim = {eta: diffusion.ddim_step(schedule, x0, eps, t, t_prev, noise, eta=eta) for eta in (0.0, 0.5, 1.0)}
    for i, (one, one_prev) in enumerate(steps):
        now, prev = at(alpha_bars, one), at(alpha_bars, one_prev)
        mean, variance = bayes(alpha_bars, x0[i].astype(np.float64), x_t[i], one, one_prev)
        beta = 1 - now / prev if one_prev >= 0 else 0
        assert_close(small[i], mean + math.sqrt(variance) * noise[i], 2e-5)
        assert_close(large[i], mean + math.sqrt(beta) * noise[i], 2e-5)
        for eta, found in ddim.items():  # Song et al. 2021, eq. 12 and 16
            sigma = eta * math.sqrt((1 - prev) / (1 - now)) * math.sqrt(1 - now / prev)
            direction = math.sqrt(max(1 - prev - sigma**2, 0))
            assert_close(found[i], math.sqrt(prev) * x0[i] + direction * eps[i] + sigma * noise[i], 2e-6)
        alone = diffusion.ddim_step(schedule, x0[i : i + 1], eps[i : i + 1], one, one_prev, noise[i : i + 1], eta=0.5)
        assert_close(alone[0], ddim[0.5][i], 1e-6)
    assert_close(ddim[1.0], small, 2e-5)  # the same Gaussian, written in x0 and eps or in x0 and x_t


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginal_whatever_eta(eta):
    """With the true x0 and eps, x_prev has standard deviation sqrt(1 - alpha_bar_prev) around its signal."""
    schedule, alpha_bars = make_schedule("cosine"), alpha_bars64("cosine", 1000)
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    for t, t_prev in ((999, 700), (700, 699), (20, 0), (5, -1)):
        from_x0, from_eps, from_noise = (
            diffusion.ddim_step(schedule, *xs[:2], t, t_prev, xs[2], eta=eta).item()
            for xs in ((one, zero, zero), (zero, one, zero), (zero, zero, one))
        )
        assert from_x0 == pytest.approx(math.sqrt(at(alpha_bars, t_prev)), rel=1e-6)
        assert from_eps**2 + from_noise**2 == pytest.approx(1 - at(alpha_bars, t_prev), rel=1e-5)
        assert (from_noise > 0) == (eta > 0 and t_prev >= 0)


# Chains against the float64 recursion


@pytest.mark.parametrize(
    ("method", "variance", "prediction"),
    [(*METHODS[0], p) for p in diffusion.PREDICTIONS] + [(*m, p) for m in METHODS[1:] for p in ("eps", "v")],
)
def test_chain_on_gaussian_data_is_the_float64_recursion(method, variance, prediction):
    """Every schedule, spacing and eta, pixel by pixel, with the noise that ``sample`` promises to draw."""
    for name, spacing in itertools.product(diffusion.SCHEDULES, diffusion.SPACINGS):
        schedule, alpha_bars, network, coefficients = exact(name, prediction=prediction)
        plan = plan_of(1000, 10, spacing)
        noise = noises(KEY, plan[0], X_T.shape)
        for eta in (0.0, 0.5, 1.0) if method == "ddim" else (0.0,):
            options = {"method": method, "variance": variance, "prediction": prediction, "eta": eta}
            found = diffusion.sample(network, schedule, X_T, KEY, plan=plan, clip_x0=False, **options)
            expected, _, _ = chain(alpha_bars, X_T, plan, noise, coefficients, **options)
            # The eps network answers in float32, and the first step of the cosine schedule divides by .00005.
            assert_close(found, expected, 3e-5 if (name, prediction) == ("cosine", "eps") else 3e-6)


@pytest.mark.parametrize(
    ("T", "S", "method", "variance", "eta"),
    [
        (30, 30, "ddpm", "fixed_large", 0.0),
        (100, 7, "ddim", "fixed_small", 0.7),
        (1000, 1, "ddim", "fixed_small", 0.7),
        (1000, 1000, "ddim", "fixed_small", 1.0),
    ],
)
def test_chain_of_other_lengths(T, S, method, variance, eta):
    schedule, alpha_bars, network, coefficients = exact("linear", T)
    plan, options = plan_of(T, S), {"method": method, "variance": variance, "eta": eta}
    found = diffusion.sample(network, schedule, X_T, KEY, num_steps=S, spacing="trailing", clip_x0=False, **options)
    noise = noises(KEY, plan[0], X_T.shape)
    expected, _, _ = chain(alpha_bars, X_T, plan, noise, coefficients, prediction="eps", **options)
    assert_close(found, expected, 3e-6 if S > 1 else 5e-5)  # one step divides the network's rounding by .006


@pytest.mark.parametrize(
    ("S", "leading", "trailing"),
    [
        (10, (0.2982, 0.3741), (0.2993, 0.3700)),
        (50, (0.2989, 0.4724), (0.2991, 0.4714)),
        (100, (0.2990, 0.4860), (0.2991, 0.4854)),
        (1000, (0.2990, 0.4985), (0.2990, 0.4985)),
    ],
)
def test_deterministic_mean_and_deviation_as_computed_elsewhere(S, leading, trailing):  # peers.md section 6
    schedule, _, network, _ = exact()
    for spacing, expected in (("leading", leading), ("trailing", trailing)):
        x0 = diffusion.sample(network, schedule, X_T, KEY, plan=plan_of(1000, S, spacing), clip_x0=False)
        deviation, mean = np.polyfit(X_T.ravel(), np.asarray(x0).ravel(), 1)  # x_0 = mean + deviation x_T
        assert (mean, deviation) == pytest.approx(expected, abs=6e-5)


def test_stochastic_mean_and_deviation_as_computed_elsewhere():  # peers.md section 6, eta = 1 and S = 10
    schedule, _, network, _ = exact()
    x_T = jax.random.normal(jax.random.key(0), (1, 200, 200, 1))
    deviations = []
    for method, variance in (METHODS[0], METHODS[2]):
        options = {"method": method, "variance": variance, "eta": 1.0 if method == "ddim" else 0.0}
        x0 = diffusion.sample(network, schedule, x_T, KEY, num_steps=10, clip_x0=False, **options)
        deviations.append(float(x0.std()))
        assert float(x0.mean()) == pytest.approx(0.3, abs=5 * STD / 200)
    assert deviations[0] == pytest.approx(0.3333, abs=5 * STD / 200)
    assert deviations[1] > STD  # fixed_large errs to the other side


def test_error_halves_when_the_steps_double():
    """The limit is known: the probability flow maps N(sqrt(ab) mu, ab s^2 + 1 - ab) onto N(mu, s^2)."""
    schedule, alpha_bars, network, _ = exact()
    ab = alpha_bars[-1]
    limit = MU + STD * (X_T - math.sqrt(ab) * MU) / math.sqrt(ab * STD**2 + 1 - ab)
    errors = [
        np.abs(diffusion.sample(network, schedule, X_T, KEY, plan=plan_of(1000, S), clip_x0=False) - limit).max()
        for S in (50, 100, 200)
    ]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert ((ratios > 1.85) & (ratios < 2.15)).all(), ratios


# DDIM against DDPM, clipping


@pytest.mark.parametrize(
    ("name", "prediction", "clip_x0"),
    [("linear", "eps", True), ("offset_cosine", "x0", True), ("cosine", "v", False)],
)
def test_ddim_with_eta_one_over_all_timesteps_is_ddpm_step_for_step(name, prediction, clip_x0):
    schedule = make_schedule(name, num_timesteps=100)
    # Unclipped, the curved network's chain would grow without bound; the exact one's does not.
    network = curved if clip_x0 else exact(name, 100, prediction)[2]
    run = functools.partial(diffusion.sample, network, schedule, X_T, KEY, num_steps=100, prediction=prediction)
    x0, ddim = run(method="ddim", eta=1.0, clip_x0=clip_x0, trajectory=100)
    expected, ddpm = run(method="ddpm", clip_x0=clip_x0, trajectory=100)
    np.testing.assert_array_equal(ddim.t, np.arange(100)[::-1])
    np.testing.assert_array_equal(ddpm.t, ddim.t)
    assert_close(ddim.x_t, ddpm.x_t, 1e-4)
    assert_close(ddim.x0_hat, ddpm.x0_hat, 3e-4)
    assert_close(x0, expected, 1e-4)
    if clip_x0:
        assert float((jnp.abs(ddpm.x0_hat) == 1).mean()) > 0.05  # clipping took place
    if prediction == "eps":
        raw, _ = run(method="ddim", eta=1.0, rederive_eps=False, trajectory=100)
        assert float(jnp.abs(raw - expected).max()) > 0.01  # and the network's own eps would not do


@pytest.mark.parametrize(("prediction", "rederive"), [("eps", True), ("eps", False), ("x0", True), ("v", False)])
def test_clipping_and_rederiving_are_two_switches(prediction, rederive):
    """Wide data, so that the exact x0 is clipped: the float64 chain with either eps, for every kind of bounds."""
    alpha_bars = alpha_bars64("linear", 1000)
    coefficients = affine(prediction, alpha_bars, 0.3, 1.5)
    network, plan = denoiser(prediction, alpha_bars, 0.3, 1.5), plan_of(1000, 10)
    noise, schedule = noises(KEY, plan[0], X_T.shape), make_schedule("linear")
    lower = np.linspace(-0.9, -0.1, 6, dtype=np.float32).reshape(3, 2, 1)
    tight = (-0.5, 0.25)
    for clip_x0, bounds in ((True, (-1, 1)), (tight, tight), ((lower, lower + 0.5), (lower, lower + 0.5))):
        for eta in (0.0, 0.6):
            options = {"prediction": prediction, "eta": eta}
            found = diffusion.sample(
                network, schedule, X_T, KEY, plan=plan, clip_x0=clip_x0, rederive_eps=rederive, **options
            )
            run = functools.partial(chain, alpha_bars, X_T, plan, noise, coefficients, method="ddim", **options)
            expected, _, x0s = run(clip=bounds, rederive=rederive)
            assert_close(found, expected, 1e-5)
            assert np.mean([np.isclose(x0, b).mean() for x0 in x0s for b in bounds]) > 0.05
    assert np.abs(run(clip=tight, rederive=False)[0] - run(clip=tight, rederive=True)[0]).max() > 0.01


def test_x0_ends_within_the_bounds():
    x_T = 3 * X_T  # curved answers up to 1.1
    for method in diffusion.METHODS:
        x0 = diffusion.sample(curved, make_schedule("linear"), x_T, KEY, num_steps=10, method=method)
        assert float(jnp.abs(x0).max()) <= 1 + 1e-6


# Keys, plans, trajectories


def test_eta_zero_ignores_the_key_and_anything_else_does_not():
    schedule = make_schedule("linear")

    def differs(a, b, **options):
        first, second = (diffusion.sample(curved, schedule, X_T, key, num_steps=10, **options) for key in (a, b))
        return bool((first != second).any())

    keys = jax.random.key(0), jax.random.key(1)
    assert not differs(*keys, eta=0.0)
    assert not differs(jax.random.split(keys[0], 4), jax.random.split(keys[1], 4), eta=0.0)
    assert differs(*keys, eta=0.1)
    assert differs(*keys, method="ddpm")
    assert not differs(keys[0], keys[0], eta=1.0)
    assert not differs(keys[0], jax.random.PRNGKey(0), eta=1.0)  # raw key data are the same key


def test_a_key_an_image_makes_images_independent():
    schedule, keys = make_schedule("linear"), jax.random.split(KEY, 4)

    def run(x_T, keys, method):
        return diffusion.sample(
            curved, schedule, x_T, keys, num_steps=10, method=method, eta=1.0 if method == "ddim" else 0.0
        )

    for method in diffusion.METHODS:
        whole = run(X_T, keys, method)
        assert_close(run(X_T[1:3], keys[1:3], method), whole[1:3], 1e-5)  # another batch size
        order = np.array([2, 0, 3, 1])
        assert_close(run(X_T[order], keys[order], method), whole[order], 1e-5)  # another place
        changed = run(np.concatenate([X_T[:1], 0 * X_T[1:]]), keys.at[1:].set(jax.random.split(keys[0], 3)), method)
        assert_close(changed[0], whole[0], 1e-5)  # other neighbours
        assert float(jnp.abs(changed[1:] - whole[1:]).max()) > 0.01
        twins = run(np.broadcast_to(X_T[:1], X_T.shape), keys, method)
        noisy = method in ("ddim", "ddpm")
        assert (float(jnp.abs(twins[1] - twins[0]).max()) > 0.01) == noisy  # same start, other key


def test_noise_of_a_key_an_image_is_that_of_the_key():
    schedule, alpha_bars, network, coefficients = exact()
    keys, plan = jax.random.split(KEY, 4), plan_of(1000, 10)
    found = diffusion.sample(network, schedule, X_T, keys, plan=plan, eta=1.0, clip_x0=False)
    noise = noises(keys, plan[0], X_T.shape)
    expected, _, _ = chain(alpha_bars, X_T, plan, noise, coefficients, prediction="eps", method="ddim", eta=1.0)
    assert_close(found, expected, 3e-6)


@pytest.mark.parametrize(("method", "eta"), [("ddim", 0.8), ("ddpm", 0.0)])
def test_two_half_chains_are_the_whole(method, eta):
    schedule, (t, t_prev) = make_schedule("linear"), plan_of(1000, 10)
    run = functools.partial(diffusion.sample, curved, schedule, method=method, eta=eta)
    whole = run(X_T, KEY, plan=(t, t_prev))
    half = run(X_T, KEY, plan=(t[:5], t_prev[:5]))
    assert float(jnp.abs(half - whole).max()) > 0.1
    both = run(half, KEY, plan=(t[5:].tolist(), t_prev[5:].tolist()))
    assert_close(both, whole, 1e-6)


def test_a_chain_that_stops_early_has_the_marginal_of_that_level():
    schedule, alpha_bars, network, coefficients = exact()
    t, t_prev = (x[:10] for x in plan_of(1000, 16))
    ab = alpha_bars[t_prev[-1]]
    assert 0.2 < ab < 0.4
    for method, variance in METHODS:
        options = {"method": method, "variance": variance}
        found = diffusion.sample(network, schedule, X_T, KEY, plan=(t, t_prev), clip_x0=False, **options)
        noise = noises(KEY, t, X_T.shape)
        expected, _, _ = chain(alpha_bars, X_T, (t, t_prev), noise, coefficients, prediction="eps", **options)
        assert_close(found, expected, 3e-6)
        if method == "ddim":
            deviation, mean = np.polyfit(X_T.ravel(), np.asarray(found).ravel(), 1)
            assert mean == pytest.approx(math.sqrt(ab) * MU, abs=0.02)
            assert deviation == pytest.approx(math.sqrt(ab * STD**2 + 1 - ab), abs=0.05)


def test_trajectory_holds_what_the_network_saw_and_guessed():
    alpha_bars = alpha_bars64("linear", 1000)
    coefficients = affine("eps", alpha_bars, 0.3, 1.5)
    schedule, network, plan = make_schedule("linear"), denoiser("eps", alpha_bars, 0.3, 1.5), plan_of(1000, 10)
    x0, trajectory = diffusion.sample(network, schedule, X_T, KEY, plan=plan, eta=0.5, trajectory=4)
    noise = noises(KEY, plan[0], X_T.shape)
    expected, xs, x0s = chain(
        alpha_bars, X_T, plan, noise, coefficients, prediction="eps", method="ddim", eta=0.5, clip=(-1, 1)
    )
    where = [0, 3, 6, 9]
    assert isinstance(trajectory, diffusion.Trajectory)
    assert trajectory.t.dtype == jnp.int32
    np.testing.assert_array_equal(trajectory.t, plan[0][where])
    assert_close(trajectory.x_t, np.stack(xs)[where], 1e-5)
    assert_close(trajectory.x0_hat, np.stack(x0s)[where], 1e-4)
    assert_close(x0, expected, 1e-5)
    np.testing.assert_array_equal(trajectory.x_t[0], X_T)
    assert_close(trajectory.x0_hat[-1], x0, 1e-6)  # the last step returns its guess
    assert_close(diffusion.sample(network, schedule, X_T, KEY, plan=plan, eta=0.5), x0, 1e-6)


# What it costs


def test_a_chain_costs_its_network_calls_and_no_more():
    seen = []

    def network(x_t, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return 0.1 * x_t

    plan = plan_of(1000, 7)
    for method in diffusion.METHODS:
        seen.clear()
        diffusion.sample(network, make_schedule("linear"), X_T, KEY, plan=plan, method=method).block_until_ready()
        jax.effects_barrier()
        calls = [*plan[0], *plan[0][1:]] if method == "heun" else plan[0]
        assert len(seen) == len(calls)
        assert all(t.dtype == np.int32 and t.shape == (4,) for t in seen)
        np.testing.assert_array_equal(sorted(np.stack(seen)[:, 0]), sorted(calls))


def test_new_values_compile_nothing_new():
    traced, compiled = [], samplers._run_chain(None)._cache_size()

    def network(params, x_t, t):
        assert (x_t.dtype, t.dtype, t.shape) == (jnp.float32, jnp.int32, (4,))
        traced.append(x_t)
        return params["w"] * x_t + params["b"]

    def run(w=0.5, name="linear", spacing="trailing", **options):
        params = {"w": jnp.float32(w), "b": jnp.zeros(2)[:1]}
        options = {"key": KEY, "eta": 0.0, "clip_x0": (-1.0, 1.0)} | options
        plan = plan_of(1000, 10, spacing)
        return diffusion.sample(Partial(network, params), make_schedule(name), X_T, plan=plan, **options)

    first = run()
    results = [run(w=0.7), run(name="cosine"), run(spacing="quadratic"), run(clip_x0=(-0.5, 0.5))]
    results += [run(eta=0.5), run(eta=1), run(eta=np.float32(0.1)), run(eta=0.5, key=jax.random.key(9))]
    assert all((first != other).any() for other in results)  # each was listened to
    np.testing.assert_array_equal(first, run(clip_x0=True))
    assert len(traced) == 1
    assert samplers._run_chain(None)._cache_size() == compiled + 1
    run(trajectory=2)
    assert len(traced) == 2  # so the counter does count


def test_new_bounds_in_arrays_compile_nothing_new():
    traced, lower = [], np.full((3, 2, 1), -0.5)

    def network(x_t, t):
        traced.append(t)
        return 0.2 * x_t

    for bounds in ((lower, -lower), (2 * lower, -lower), (jnp.asarray(lower), -jnp.asarray(lower))):
        diffusion.sample(network, make_schedule("linear"), X_T, KEY, plan=plan_of(1000, 3), clip_x0=bounds)
    assert len(traced) == 1


def test_a_plain_function_is_cached_by_identity_and_partials_by_structure():
    calls = []

    def network(x_t, t):
        calls.append("plain")
        return 0.1 * x_t

    def scaled(scale, x_t, t):
        calls.append("partial")
        return scale * x_t

    def run(denoise_fn):
        return diffusion.sample(denoise_fn, make_schedule("linear"), X_T, KEY, plan=plan_of(1000, 3))

    first = run(network)
    np.testing.assert_array_equal(run(network), first)
    assert calls == ["plain"]
    assert_close(run(Partial(scaled, 0.1)), first, 1e-6)
    assert (run(Partial(scaled, 0.3)) != first).any()
    assert calls == ["plain", "partial"]


def test_on_step_counts_every_step_and_a_new_one_compiles_nothing():
    traced = []

    def network(x_t, t):
        traced.append(t)
        return 0.1 * x_t

    def run(**options):
        return diffusion.sample(network, make_schedule("linear"), X_T, KEY, plan=plan_of(1000, 20), **options)

    silent = run()
    first, second = [], []
    heard = run(on_step=first.append)
    assert first == list(range(20))  # all of them have come when sample returns
    run(on_step=lambda i: second.append(i))
    assert second == list(range(20))
    assert first == list(range(20))
    assert len(traced) == 2  # silent, and with a listener
    np.testing.assert_array_equal(silent, heard)
    with pytest.raises(Exception, match="division by zero"):  # not swallowed
        run(on_step=lambda i: 1 / 0)
    assert not listening._listeners


# Within other transformations, dtypes


def test_sample_inside_an_outer_jit():
    plan = plan_of(1000, 10)

    @jax.jit
    def outer(schedule, x_T, key, eta, scale):
        network = Partial(lambda s, x_t, t: s * x_t, scale)
        return diffusion.sample(network, schedule, 2 * x_T, key, plan=plan, eta=eta)

    network = Partial(lambda s, x_t, t: s * x_t, 0.2)
    for eta in (0.0, 0.7):
        inner = diffusion.sample(network, make_schedule("linear"), 2 * X_T, KEY, plan=plan, eta=eta)
        assert_close(outer(make_schedule("linear"), X_T, KEY, eta, 0.2), inner, 1e-6)


def test_sample_has_a_gradient():
    """By finite differences of the float64 chain, in x_T; the weights' gradient is finite."""
    schedule, alpha_bars, network, coefficients = exact()
    plan = plan_of(1000, 10)

    def total(x_T, network):
        return diffusion.sample(network, schedule, x_T, KEY, plan=plan, eta=0.5, clip_x0=False).sum()

    by_x, by_network = jax.grad(total, argnums=(0, 1))(jnp.asarray(X_T), network)
    noise, h = noises(KEY, plan[0], X_T.shape), 1e-4
    up, down = (
        chain(
            alpha_bars, X_T.astype(np.float64) + d, plan, noise, coefficients, prediction="eps", method="ddim", eta=0.5
        )[0]
        for d in (h, -h)
    )
    assert_close(by_x, (up - down) / (2 * h), 1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_network))


def test_the_chain_is_float32_whatever_comes_in_and_out_of_the_network():
    def network(x_t, t):
        return (0.1 * x_t).astype(jnp.bfloat16)

    x0, trajectory = diffusion.sample(
        network, make_schedule("linear"), X_T.astype(jnp.bfloat16), KEY, plan=plan_of(1000, 3), trajectory=1
    )
    assert x0.dtype == trajectory.x_t.dtype == trajectory.x0_hat.dtype == jnp.float32


@pytest.mark.parametrize("keys", [1, 4])
def test_the_chain_is_float32_under_x64_too(keys):
    key = KEY if keys == 1 else jax.random.split(KEY, 4)
    args = make_schedule("linear"), X_T, key
    options = {"plan": plan_of(1000, 10), "eta": 0.5}
    expected = diffusion.sample(curved, *args, **options)
    with jax.enable_x64(True):
        x0 = diffusion.sample(curved, *args, **options)
    assert x0.dtype == jnp.float32
    assert_close(x0, expected, 1e-4)


def test_one_image_of_odd_shape():
    x_T = jnp.ones((1, 5, 2, 3))
    assert diffusion.sample(fading, make_schedule("linear"), x_T, KEY, plan=plan_of(1000, 3)).shape == x_T.shape


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, r"sampling\.method='euler': choose one of ddim, ddpm"),
        ({"variance": "small"}, r"sampling\.variance='small': choose one of fixed_small, fixed_large"),
        ({"prediction": "epsilon"}, r"diffusion\.prediction='epsilon': choose one of eps, x0, v"),
        ({"spacing": "uniform"}, r"sampling\.spacing='uniform'"),
        ({"num_steps": 0}, r"sampling\.num_steps=0"),
        ({"num_steps": 1001}, r"sampling\.num_steps=1001: must lie in 1 \.\. 1000"),
        ({"num_steps": 1}, "use trailing"),
        ({"eta": -0.1}, r"sampling\.eta=-0\.1: must lie in 0 \.\. 1"),
        ({"eta": 1.5}, r"sampling\.eta=1\.5"),
        ({"eta": float("nan")}, r"sampling\.eta=nan"),
        ({"eta": 0.5, "method": "ddpm"}, r"'ddpm' has no eta"),
        ({"trajectory": 51}, r"trajectory=51: must lie in 0 \.\. 50"),
        ({"trajectory": -1}, r"trajectory=-1"),
        ({"clip_x0": (-1.0, 0.0, 1.0)}, "pair of bounds"),
        ({"clip_x0": (1.0,)}, "pair of bounds"),
        ({"key": jax.random.split(KEY, 3)}, r"shape \(3,\); give one key, or 4 keys"),
        ({"key": jax.random.split(KEY, (4, 1))}, r"shape \(4, 1\)"),
        ({"plan": ([9, 3], [3])}, "plan"),
        ({"plan": ([], [])}, "plan"),
        ({"plan": ([[9, 3]], [[3, -1]])}, "plan"),
        ({"plan": ([9.0, 3.0], [3.0, -1.0])}, "must be int"),
        ({"plan": ([1000, 3], [3, -1])}, r"step 0 goes from t = 1000 to t_prev = 3"),
        ({"plan": ([9, 3], [3, 3])}, r"step 1 goes from t = 3 to t_prev = 3"),
        ({"plan": ([9, 3], [3, -2])}, r"step 1 .*t_prev = -2"),
        ({"plan": ([9, -1], [3, -1])}, r"step 1 goes from t = -1"),
    ],
)
def test_wrong_arguments_are_refused_with_one_clear_line(options, message):
    options = {"key": KEY} | options
    with pytest.raises(ValueError, match=message) as refusal:
        diffusion.sample(curved, make_schedule("linear"), X_T, **options)
    assert "\n" not in str(refusal.value)


def test_warnings_of_the_plan_point_at_the_caller():
    with pytest.warns(diffusion.ScheduleWarning, match="use trailing") as caught:
        diffusion.sample(curved, make_schedule("linear"), X_T, KEY, num_steps=5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.sample(curved, make_schedule("linear"), X_T, KEY, num_steps=10)
