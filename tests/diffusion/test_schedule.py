import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import alpha_bars64, betas64
from scipy.special import expit

from ddpm_jax import diffusion
from ddpm_jax.diffusion import schedule as schedule_module
from ddpm_jax.diffusion.schedule import beta_between, rates

SCALED = ("linear", "quadratic", "sigmoid")


@pytest.mark.parametrize("T", [25, 100, 1000, 4000])
@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_tables_are_the_float64_formula_rounded_once(name, T):
    schedule = diffusion.make_schedule(name, num_timesteps=T)
    betas, alpha_bars = betas64(name, T), alpha_bars64(name, T)
    assert schedule.num_timesteps == T
    assert all(table.shape == (T,) and table.dtype == jnp.float32 for table in schedule)
    np.testing.assert_allclose(schedule.betas, betas, rtol=2e-7)
    np.testing.assert_allclose(schedule.alpha_bars, alpha_bars, rtol=2e-7)
    np.testing.assert_allclose(schedule.noise_levels, 1 - alpha_bars, rtol=2e-7)


def test_formula_of_each_schedule_at_points_worked_out_by_hand():
    betas = {name: diffusion.make_schedule(name).betas for name in SCALED}
    for name in ("linear", "quadratic"):
        np.testing.assert_allclose(betas[name][jnp.array([0, -1])], [1e-4, 0.02], rtol=1e-6)
    np.testing.assert_allclose(betas["linear"][333], 1e-4 + 0.0199 / 3, rtol=1e-6)  # 333 / 999 = 1 / 3
    np.testing.assert_allclose(betas["quadratic"][333], (0.01 + (0.02**0.5 - 0.01) / 3) ** 2, rtol=1e-6)
    np.testing.assert_allclose(betas["sigmoid"][333], 1e-4 + 0.0199 * expit(-2), rtol=1e-6)
    ends = diffusion.make_schedule("offset_cosine").alpha_bars[jnp.array([0, -1])]
    np.testing.assert_allclose(ends, [0.95**2, 0.02**2], rtol=1e-6)
    cosine = diffusion.make_schedule("cosine")
    np.testing.assert_allclose(cosine.betas[-1], 0.999, rtol=1e-6)
    middle = (np.cos(0.508 / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    np.testing.assert_allclose(cosine.alpha_bars[499], middle, rtol=1e-6)


def test_published_ends_of_the_schedules():  # peers.md 4.1, recomputed there in float64
    final = {name: float(diffusion.make_schedule(name).alpha_bars[-1]) for name in diffusion.SCHEDULES}
    assert final["linear"] == pytest.approx(4.0358e-5, rel=2e-5)
    assert final["quadratic"] == pytest.approx(7.3e-4, rel=0.01)
    assert final["sigmoid"] == pytest.approx(3.97e-5, rel=2e-3)
    assert final["cosine"] == pytest.approx(2.43e-9, rel=2e-3)
    assert float(diffusion.make_schedule("cosine").betas[0]) == pytest.approx(4.13e-5, rel=1e-3)


def test_noise_level_at_the_first_step_keeps_what_a_float32_subtraction_loses():
    schedule = diffusion.make_schedule("linear")
    assert float(schedule.noise_levels[0]) == pytest.approx(1e-4, rel=1e-6)
    assert float(1 - schedule.alpha_bars[0]) != pytest.approx(1e-4, rel=1e-5)  # so the third table earns its place


@pytest.mark.parametrize("name", SCALED)
def test_beta_range_scales_by_1000_over_T(name):
    short = diffusion.make_schedule(name, num_timesteps=100)
    np.testing.assert_allclose(short.betas[jnp.array([0, -1])], 10 * betas64(name, 1000)[[0, -1]], rtol=1e-6)
    with pytest.warns(diffusion.ScheduleWarning):
        bare = diffusion.make_schedule(name, num_timesteps=100, scale_betas=False)
    np.testing.assert_allclose(bare.betas, betas64(name, 100, scale=False), rtol=2e-7)
    np.testing.assert_allclose(bare.betas * 10, short.betas, rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "offset_cosine"])
def test_the_cosine_schedules_have_no_beta_range(name):
    plain = diffusion.make_schedule(name, num_timesteps=50)
    other = diffusion.make_schedule(name, num_timesteps=50, scale_betas=False, beta_start=0.1, beta_end=0.2)
    jax.tree.map(np.testing.assert_array_equal, plain, other)


def test_beta_range_is_an_argument():
    schedule = diffusion.make_schedule("linear", num_timesteps=500, beta_start=2e-4, beta_end=0.03)
    np.testing.assert_allclose(schedule.alpha_bars, alpha_bars64("linear", 500, start=2e-4, end=0.03), rtol=2e-7)


@pytest.mark.parametrize(("name", "T"), [(n, T) for n in SCALED for T in (2, 5, 10, 19)] + [("linear", 20)])
def test_a_scaled_beta_outside_its_range_is_refused_with_both_remedies(name, T):
    with pytest.raises(ValueError, match=rf"num_timesteps={T}\b") as refusal:
        diffusion.make_schedule(name, num_timesteps=T)
    assert "raise num_timesteps" in str(refusal.value)
    assert "scale_betas=False" in str(refusal.value)


@pytest.mark.parametrize("name", SCALED)
def test_each_remedy_works(name):
    assert diffusion.make_schedule(name, num_timesteps=21).num_timesteps == 21
    with pytest.warns(diffusion.ScheduleWarning):
        assert diffusion.make_schedule(name, num_timesteps=10, scale_betas=False).num_timesteps == 10


@pytest.mark.parametrize("betas", [[0.0, 0.9], [1.0, 0.9], [0.9, 1.1], [-0.1, 0.9], [0.5, np.nan], [1.0, 1.0]])
def test_betas_outside_0_1_are_refused(betas):
    with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
        diffusion.schedule_from_betas(betas)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, np.nan])
@pytest.mark.parametrize("field", ["beta_start", "beta_end"])
def test_a_beta_range_outside_0_1_is_refused_by_its_own_name(field, beta):
    with pytest.raises(ValueError, match=rf"diffusion\.{field}={beta}: must lie in \(0, 1\)"):
        diffusion.make_schedule("quadratic", **{field: beta})


def test_a_table_is_taken_as_it_is():
    betas = alpha_bars64("cosine", 50)[::-1] * 0.9  # any numbers in (0, 1); never scaled by 1000 / T
    schedule = diffusion.make_schedule("table", num_timesteps=50, betas=tuple(betas))
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-7)
    np.testing.assert_allclose(schedule.alpha_bars, np.cumprod(1 - betas), rtol=1e-6)
    pure = diffusion.make_schedule("table", num_timesteps=2, betas=(0.5, 1.0))  # the last may end in pure noise
    np.testing.assert_array_equal(pure.alpha_bars, [0.5, 0.0])
    np.testing.assert_array_equal(pure.noise_levels, [0.5, 1.0])


@pytest.mark.parametrize(
    ("name", "T", "betas", "message"),
    [
        ("table", 3, (0.5, 0.9), "num_timesteps=3: diffusion.betas has 2 numbers; give one a timestep"),
        ("table", 3, (), r"diffusion.betas: shape \(0,\)"),
        ("table", 2, (1.0, 0.9), r"diffusion.betas\[0\]=1: is outside \(0, 1\)"),
        ("table", 2, (0.5, 1.5), r"diffusion.betas\[1\]=1.5: is outside \(0, 1\)"),
        ("linear", 2, (0.5, 0.9), "schedule='linear': has a formula of its own; use 'table'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(name, T, betas, message):
    with pytest.raises(ValueError, match=message):
        diffusion.make_schedule(name, num_timesteps=T, betas=betas)


def test_unknown_name_and_too_few_timesteps():
    with pytest.raises(ValueError, match=r"'linaer'.*linear, cosine") as refusal:
        diffusion.make_schedule("linaer")
    assert all(name in str(refusal.value) for name in diffusion.SCHEDULES)
    with pytest.raises(ValueError, match="num_timesteps=0"):
        diffusion.make_schedule("linear", num_timesteps=0)


def test_warns_exactly_where_the_chain_does_not_end_in_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in diffusion.SCHEDULES:
            for T in (30, 200, 1000, 4000):
                diffusion.make_schedule(name, num_timesteps=T)
        diffusion.schedule_from_betas(1 - np.array([0.5, 0.0299**2 / 0.5]))
    with pytest.warns(diffusion.ScheduleWarning, match=r"0\.0301.*0\.03"):
        diffusion.schedule_from_betas(1 - np.array([0.5, 0.0301**2 / 0.5]))
    with pytest.warns(diffusion.ScheduleWarning, match=r"sqrt\(alpha_bar_T\) = 0\.36") as caught:  # the seed's T = 200
        diffusion.make_schedule("linear", num_timesteps=200, scale_betas=False)
    assert caught[0].filename == __file__


def test_rates_at_clean_data_at_every_t_and_outside():
    schedule, alpha_bars = diffusion.make_schedule("linear", num_timesteps=50), alpha_bars64("linear", 50)
    t = jnp.array([-1, 0, 17, 49, 50, -2, -50, 2**31 - 1, -(2**31)])
    found = rates(schedule, t, jnp.zeros((len(t), 2, 3, 1)))
    assert found.alpha_bar.shape == found.noise_level.shape == (len(t), 1, 1, 1)
    expected = np.array([1.0, *alpha_bars[[0, 17, 49]]])
    np.testing.assert_allclose(found.alpha_bar.ravel()[:4], expected, rtol=2e-7)
    np.testing.assert_allclose(found.noise_level.ravel()[:4], 1 - expected, rtol=2e-7)
    np.testing.assert_allclose(found.signal.ravel()[:4], np.sqrt(expected), rtol=2e-7)
    np.testing.assert_allclose(found.noise.ravel()[:4], np.sqrt(1 - expected), rtol=2e-7)
    assert np.isnan(found.alpha_bar.ravel()[4:]).all()
    assert np.isnan(found.noise_level.ravel()[4:]).all()


@pytest.mark.parametrize("ndim", [1, 2, 4])
def test_rates_broadcast_for_one_t_and_for_one_a_row(ndim):
    schedule = diffusion.make_schedule("cosine", num_timesteps=50)
    x = jnp.zeros((3,) * ndim)
    assert rates(schedule, 7, x).signal.shape == (1,) * ndim
    assert rates(schedule, jnp.array([7, 8, 9]), x).signal.shape == (3,) + (1,) * (ndim - 1)
    np.testing.assert_array_equal(
        rates(schedule, 7, x).alpha_bar.ravel(), rates(schedule, jnp.full(3, 7), x).alpha_bar.ravel()[:1]
    )


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_beta_between_is_one_minus_the_ratio(name):
    schedule, alpha_bars = diffusion.make_schedule(name), np.append(alpha_bars64(name, 1000), 1.0)
    t, t_prev = (i.ravel() for i in np.meshgrid(np.arange(1000), np.arange(-1, 999)))
    t, t_prev = t[t_prev < t], t_prev[t_prev < t]
    x = jnp.zeros(t.shape)
    found = beta_between(rates(schedule, jnp.asarray(t), x), rates(schedule, jnp.asarray(t_prev), x))
    # A naive float32 1 - a/b errs by up to 1.5e-3 next to clean data.
    np.testing.assert_allclose(found, 1 - alpha_bars[t] / alpha_bars[t_prev], rtol=5e-5)


def test_a_schedule_is_a_pytree_of_arguments():
    traced = []

    @jax.jit
    def last(schedule):
        traced.append(schedule)
        return schedule.alpha_bars[-1]

    for name in diffusion.SCHEDULES:
        assert last(diffusion.make_schedule(name, num_timesteps=64)) == pytest.approx(alpha_bars64(name, 64)[-1], 1e-6)
    assert len(traced) == 1
    assert set(diffusion.SCHEDULES) == {"linear", "cosine", "quadratic", "sigmoid", "offset_cosine"}
    assert schedule_module.MAX_FINAL_SIGNAL_RATE == 0.03
