"""What the README says about adding one's own: a function and a line."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, limits
from ddpm_jax.diffusion import losses, samplers, schedule, steps


def test_a_new_loss_is_a_line(monkeypatch):
    monkeypatch.setitem(losses._DISTANCES, "log_cosh", lambda difference: jnp.log(jnp.cosh(difference)))
    found = diffusion.loss("log_cosh", jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)))
    np.testing.assert_allclose(found, [np.log(np.cosh([1.0, 2.0])).mean()], rtol=1e-6)


def test_a_new_weighting_is_a_line(monkeypatch):
    monkeypatch.setitem(losses._WEIGHTS, "snr", lambda prediction, snr, gamma: snr)
    table = diffusion.make_schedule("cosine", num_timesteps=30)
    found = diffusion.weight("snr", "x0", table, jnp.array([3]))
    np.testing.assert_allclose(found, [table.alpha_bars[3] / (1 - table.alpha_bars[3])], rtol=1e-5)


def test_a_new_schedule_is_a_line(monkeypatch):
    monkeypatch.setitem(schedule._SCHEDULES, "constant", lambda num_timesteps, start, end: np.full(num_timesteps, end))
    monkeypatch.setattr(schedule, "SCHEDULES", tuple(schedule._SCHEDULES))
    found = diffusion.make_schedule("constant", num_timesteps=100, beta_end=0.01)
    np.testing.assert_allclose(found.alpha_bars, 0.9 ** np.arange(1, 101), rtol=1e-5)  # scaled by 1000 / T


def test_the_choices_of_the_config_are_the_dictionaries():
    for field, table in (
        ("diffusion.schedule", schedule._SCHEDULES),
        ("diffusion.loss", losses._DISTANCES),
        ("diffusion.loss_weight", losses._WEIGHTS),
        ("sampling.method", steps.STEPS),
    ):
        assert set(table) <= set(limits.CHOICES[field])


def test_a_new_sampler_is_a_line(monkeypatch):
    def euler(m):
        return steps.ddim_step(m.schedule, m.guess.x0_hat, m.guess.eps_hat, m.t, m.t_prev, jnp.zeros_like(m.x_t))

    monkeypatch.setitem(steps.STEPS, "euler", euler)
    monkeypatch.setattr(samplers, "METHODS", tuple(steps.STEPS))  # which the module takes from it when it is imported
    table, x_T = diffusion.make_schedule("cosine", num_timesteps=30), jnp.ones((1, 2, 2, 1))
    options = {"num_steps": 5, "spacing": "trailing"}
    chains = [
        diffusion.sample(lambda x, t: 0.5 * x, table, x_T, jax.random.key(0), method=method, **options)
        for method in ("ddim", "euler")
    ]
    np.testing.assert_array_equal(*chains)
