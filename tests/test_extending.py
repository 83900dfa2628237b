"""What the README says about adding one's own: a function and a line."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion
from ddpm_jax.diffusion import losses, samplers, steps


def test_a_new_loss_is_a_line(monkeypatch):
    monkeypatch.setitem(losses._DISTANCES, "log_cosh", lambda difference: jnp.log(jnp.cosh(difference)))
    found = diffusion.loss("log_cosh", jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)))
    np.testing.assert_allclose(found, [np.log(np.cosh([1.0, 2.0])).mean()], rtol=1e-6)


def test_a_new_sampler_is_a_line(monkeypatch):
    def euler(m):
        return steps.ddim_step(m.schedule, m.guess.x0_hat, m.guess.eps_hat, m.t, m.t_prev, jnp.zeros_like(m.x_t))

    monkeypatch.setitem(steps.STEPS, "euler", euler)
    monkeypatch.setattr(samplers, "METHODS", tuple(steps.STEPS))  # which the module takes from it when it is imported
    schedule, x_T = diffusion.make_schedule("cosine", num_timesteps=30), jnp.ones((1, 2, 2, 1))
    options = {"num_steps": 5, "spacing": "trailing"}
    chains = [
        diffusion.sample(lambda x, t: 0.5 * x, schedule, x_T, jax.random.key(0), method=method, **options)
        for method in ("ddim", "euler")
    ]
    np.testing.assert_array_equal(*chains)
