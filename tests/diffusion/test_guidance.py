"""Classifier-free guidance against its formula, and what it does to Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddpm_jax import diffusion

NULL = 3


def denoise(scale, x_t, t, label):
    return scale * x_t * (1 + label)[:, None, None, None] + t[:, None, None, None]


def test_guided_is_the_formula_image_by_image():
    x_t = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    t = jnp.array([5, 6, 7, 8])
    label = jnp.array([0, 2, 1, 0])
    for w in (0.0, 1.0, 2.5):
        output = diffusion.guided(Partial(denoise, 0.5), label, NULL, w)(x_t, t)
        null, labelled = (denoise(0.5, x_t, t, x) for x in (jnp.full(4, NULL), label))
        np.testing.assert_allclose(output, null + w * (labelled - null), rtol=1e-6)


def test_guidance_one_is_the_conditional_and_zero_the_unconditional_network():
    x_t, t, label = jnp.ones((2, 1, 1, 1)), jnp.array([1, 2]), jnp.array([0, 1])
    plain = Partial(denoise, 1.0)
    np.testing.assert_array_equal(diffusion.guided(plain, label, NULL, 1)(x_t, t), denoise(1.0, x_t, t, label))
    np.testing.assert_array_equal(
        diffusion.guided(plain, label, NULL, 0)(x_t, t), denoise(1.0, x_t, t, jnp.array([NULL, NULL]))
    )


def test_one_network_call_a_step_and_no_compilation_for_another_weight():
    calls = []

    def counted(x_t, t, label):
        calls.append(x_t.shape)
        return 0.1 * x_t * label[:, None, None, None]

    schedule = diffusion.make_schedule("cosine", num_timesteps=20)
    x_T = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
    network = Partial(counted)
    for w in (2.0, 3.0):
        guided = diffusion.guided(network, jnp.array([0, 1]), NULL, w)
        diffusion.sample(guided, schedule, x_T, jax.random.key(1), num_steps=4, spacing="trailing")
    assert calls == [(4, 2, 2, 1)]  # traced once, for both weights, with both halves in one batch
