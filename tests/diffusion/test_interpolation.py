"""slerp against the plane that two vectors span, and at the angles where the formula is 0 / 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import diffusion

SHAPE = (3, 8, 8, 2)
A, B = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
WEIGHTS = np.linspace(0, 1, 7)


def norms(x):
    return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)


def angle(x, y):
    x, y = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (x, y))
    return np.arccos(np.clip((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1), -1, 1))


def test_it_is_the_formula_in_float64():
    theta = angle(A, B)[:, None, None, None]
    for w in WEIGHTS:
        expected = np.sin((1 - w) * theta) / np.sin(theta) * A + np.sin(w * theta) / np.sin(theta) * B
        np.testing.assert_allclose(diffusion.slerp(A, B, w), expected, atol=2e-6)


def test_on_a_sphere_it_keeps_the_norm_and_moves_at_one_speed():
    b = B * (norms(A) / norms(B))[:, None, None, None]
    whole = angle(A, b)
    for w in WEIGHTS:
        point = diffusion.slerp(A, b, w)
        np.testing.assert_allclose(norms(point), norms(A), rtol=1e-5)
        np.testing.assert_allclose(angle(A, point), w * whole, atol=2e-3)  # arccos near 0


def test_the_ends_are_the_two():
    np.testing.assert_allclose(diffusion.slerp(A, B, 0.0), A, atol=1e-6)
    np.testing.assert_allclose(diffusion.slerp(A, B, 1.0), B, atol=1e-6)


@pytest.mark.parametrize("turn", [0.0, 1e-6, 1e-4, 2e-4, 1e-2])
def test_near_one_direction_it_is_the_straight_line(turn):
    b = (A + turn * B).astype(np.float32)
    for w in WEIGHTS:
        np.testing.assert_allclose(diffusion.slerp(A, b, w), (1 - w) * A + w * b, atol=2e-4)


@pytest.mark.parametrize("turn", [0.0, 1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize("shape", [SHAPE, (3, 5)])
def test_between_opposites_it_goes_round_and_not_through_zero(turn, shape):
    a, other = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    b = -a + turn * other
    # Of one norm: the formula multiplies what the norms differ by with 1 / sin(theta).
    b = (b * (norms(a) / norms(b)).reshape(-1, *(1,) * (a.ndim - 1))).astype(np.float32)
    for w in WEIGHTS:
        point = diffusion.slerp(a, b, w)
        np.testing.assert_allclose(norms(point), norms(a), rtol=0.05)
        np.testing.assert_allclose(angle(a, point), w * np.pi, atol=0.1)
    np.testing.assert_allclose(diffusion.slerp(a, b, 1.0), b, atol=0.01)


def test_zeros_stay_finite():
    zero = np.zeros_like(A)
    for a, b in ((zero, B), (A, zero), (zero, zero)):
        assert np.isfinite(diffusion.slerp(a, b, 0.3)).all()


def test_each_image_has_its_own_weight_and_it_compiles():
    weights = jnp.asarray([0.0, 0.5, 1.0])
    together = jax.jit(diffusion.slerp)(A, B, weights)
    alone = [diffusion.slerp(A[i : i + 1], B[i : i + 1], w)[0] for i, w in enumerate(weights)]
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-6)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"slerp: a has shape .* give two of one shape"):
        diffusion.slerp(A, B[:2], 0.5)
