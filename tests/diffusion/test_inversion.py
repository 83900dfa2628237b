"""DDIM inversion on Gaussian data: its float64 recursion, the exact flow, and back again."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import affine, alpha_bars64, at, denoiser

from ddpm_jax import diffusion

MU, STD, T = 0.3, 0.5, 1000
KEY = jax.random.key(0)
X0 = (MU + STD * np.random.default_rng(0).normal(size=(4, 3, 2, 1))).astype(np.float32)
ALPHA_BARS = alpha_bars64("linear", T)
SCHEDULE = diffusion.make_schedule("linear")


def plan_of(num_steps, spacing="trailing"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffusion.ScheduleWarning)
        return diffusion.timestep_plan(T, num_steps, spacing)


def inverted(prediction="eps", x0=X0, **options):
    return diffusion.invert(denoiser(prediction, ALPHA_BARS, MU, STD), SCHEDULE, x0, prediction=prediction, **options)


def recursion(plan):
    """Song et al. 2021, eq. 13, level by level upwards: y = x / sqrt(ab) moves with eps along sqrt((1 - ab) / ab)."""
    a, b = affine("eps", ALPHA_BARS, MU, STD)
    x = X0.astype(np.float64)
    for t_next, t in zip(plan[0][::-1], plan[1][::-1], strict=True):
        asked = t_next if t == -1 else t
        now, following = at(ALPHA_BARS, t), ALPHA_BARS[t_next]
        slope = math.sqrt((1 - following) / following) - math.sqrt((1 - now) / now)
        x = math.sqrt(following) * (x / math.sqrt(now) + slope * (a[asked] * x + b[asked]))
    return x


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_it_is_the_float64_recursion(prediction):
    for spacing in diffusion.SPACINGS:
        found = inverted(prediction, plan=plan_of(20, spacing))
        np.testing.assert_allclose(found, recursion(plan_of(20, spacing)), atol=3e-5)


def test_it_converges_to_the_probability_flow_at_first_order():
    ab = ALPHA_BARS[-1]
    limit = math.sqrt(ab) * MU + math.sqrt(ab * STD**2 + 1 - ab) * (X0 - MU) / STD
    errors = np.array([np.abs(inverted(num_steps=n, spacing="trailing") - limit).max() for n in (100, 200, 400)])
    ratios = errors[:-1] / errors[1:]
    assert ((ratios > 1.7) & (ratios < 2.3)).all(), errors


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_there_and_back_converges_to_the_identity_at_first_order(prediction):
    errors = []
    for num_steps in (50, 100, 200):
        plan = plan_of(num_steps)
        x_T = inverted(prediction, plan=plan)
        network = denoiser(prediction, ALPHA_BARS, MU, STD)
        back = diffusion.sample(network, SCHEDULE, x_T, KEY, plan=plan, prediction=prediction, clip_x0=False)
        errors.append(np.abs(back - X0).max())
    ratios = np.array(errors[:-1]) / errors[1:]
    assert ((ratios > 1.7) & (ratios < 2.3)).all(), errors
    assert errors[-1] < 0.05


def test_it_may_start_at_a_noise_level():
    """Two inversions, one on top of the other, are the whole one."""
    t, t_prev = plan_of(10)
    half = inverted(plan=(t[5:], t_prev[5:]))
    both = inverted(x0=half, plan=(t[:5], t_prev[:5]))
    np.testing.assert_allclose(both, inverted(plan=(t, t_prev)), atol=1e-5)


def test_the_network_is_asked_at_the_level_of_x_and_once_a_step():
    seen = []

    def network(x_t, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return 0.1 * x_t

    heard = []
    diffusion.invert(network, SCHEDULE, X0, plan=([800, 500, 20], [500, 20, -1]), on_step=heard.append)
    assert heard == [0, 1, 2]
    assert sorted(t[0] for t in seen) == [20, 20, 500]
    assert all(t.shape == (4,) and t.dtype == np.int32 for t in seen)


def test_up_to_a_level_without_signal_it_is_the_noise_alone():
    schedule = SCHEDULE._replace(
        alpha_bars=SCHEDULE.alpha_bars.at[-1].set(0.0), noise_levels=SCHEDULE.noise_levels.at[-1].set(1.0)
    )
    network = denoiser("v", np.append(ALPHA_BARS[:-1], 0.0), MU, STD)
    x_T = diffusion.invert(network, schedule, X0, num_steps=200, spacing="trailing", prediction="v")
    np.testing.assert_allclose(x_T, (X0 - MU) / STD, atol=0.05)


def test_wrong_arguments_are_refused():
    for options, message in (
        ({"prediction": "noise"}, "'noise': choose one of"),
        ({"num_steps": 0}, r"sampling\.num_steps=0"),
        ({"plan": ([3], [5])}, "step 0 goes from t = 3 to t_prev = 5"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion.invert(lambda x, t: x, SCHEDULE, X0, **options)
    with pytest.raises(ValueError, match="must be alike"):
        diffusion.invert(lambda x, t: x[..., :0], SCHEDULE, X0, plan=plan_of(3))
    with pytest.raises(ValueError, match="inside another jit"):
        jax.jit(lambda x: diffusion.invert(jnp.sin, SCHEDULE, x, plan=plan_of(3), on_step=print))(X0)
