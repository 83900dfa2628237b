import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import diffusion
from ddpm_jax.diffusion.continuous import schedule_at

BOTH = pytest.mark.parametrize("name", ["cosine", "offset_cosine"])
U = np.concatenate([[0.0, 1e-4, 1e-3], np.linspace(0.01, 0.99, 50), [0.999, 1.0]])


def alpha_bar(name, u):
    """The formulas of the papers, float64."""
    if name == "cosine":
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    start, end = math.acos(0.95), math.acos(0.02)
    return np.cos(start + u * (end - start)) ** 2


@BOTH
@pytest.mark.parametrize("jit", [False, True])
def test_the_levels_are_the_formulas(name, jit):
    u = U.astype(np.float32)
    found = (jax.jit(schedule_at, static_argnums=0) if jit else schedule_at)(name, jnp.asarray(u))
    expected = alpha_bar(name, u.astype(np.float64))
    np.testing.assert_allclose(found.alpha_bars, expected, rtol=2e-5, atol=1e-7)
    # With all their digits near clean data too, where 1 - alpha_bar in float32 would lose them.
    np.testing.assert_allclose(found.noise_levels, 1 - expected, rtol=2e-5, atol=1e-9)
    assert bool(jnp.isnan(found.betas).all())


def test_offset_cosine_goes_from_the_signal_rate_95_to_02():
    levels = schedule_at("offset_cosine", jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(jnp.sqrt(levels.alpha_bars), [0.95, 0.02], rtol=1e-5)


@pytest.mark.parametrize(("name", "end"), [("offset_cosine", 100), ("cosine", 97)])  # the last betas are capped
def test_the_table_holds_the_same_levels(name, end):
    table = diffusion.make_schedule(name, num_timesteps=100)
    t = jnp.arange(end)
    found = schedule_at(name, t / 99 if name == "offset_cosine" else (t + 1) / 100)
    np.testing.assert_allclose(found.alpha_bars, table.alpha_bars[:end], rtol=1e-4)
    np.testing.assert_allclose(found.noise_levels, table.noise_levels[:end], rtol=1e-4)


@BOTH
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("weighting", diffusion.WEIGHTS)
def test_losses_take_it_as_they_take_a_table(name, prediction, weighting):
    """Each example meets its own level: the same numbers as from the long table, where the levels agree."""
    rng = np.random.default_rng(0)
    t = jnp.array([3, 40, 90, 41])
    x0, eps = (jnp.asarray(rng.normal(size=(4, 2, 2, 1)), jnp.float32) for _ in range(2))
    table = diffusion.make_schedule(name, num_timesteps=100)
    levels = schedule_at(name, t / 99 if name == "offset_cosine" else (t + 1) / 100)

    def everything(schedule, t):
        x_t = diffusion.q_sample(schedule, x0, t, eps)
        return [
            x_t,
            diffusion.target(prediction, schedule, x0, eps, t),
            diffusion.weight(weighting, prediction, schedule, t),
            diffusion.x0_from(prediction, schedule, eps, x_t, t),
        ]

    for found, expected in zip(everything(levels, jnp.arange(4)), everything(table, t), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@BOTH
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("weighting", diffusion.WEIGHTS)
def test_weights_are_finite_at_both_ends(name, prediction, weighting):
    u = jnp.array([0.0, 1e-7, 0.5, 1 - 2**-24])
    weights = diffusion.weight(weighting, prediction, schedule_at(name, u), jnp.arange(4))
    assert bool(jnp.isfinite(weights[1:]).all())
    assert name == "cosine" or bool(jnp.isfinite(weights).all())


@pytest.mark.parametrize("name", ["linear", "quadratic", "sigmoid", "table"])
def test_a_schedule_without_such_a_form_is_refused_by_name(name):
    with pytest.raises(
        ValueError, match=rf"^diffusion\.time='continuous': the schedule '{name}' .* cosine, offset_cos"
    ):
        schedule_at(name, jnp.zeros(1))
