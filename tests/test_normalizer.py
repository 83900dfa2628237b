import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import images, normalizer
from ddpm_jax.normalizer import Normalizer

RAMP = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)  # every level in every channel
ODD = Normalizer((-0.13, 0.27, 0.4), (0.58, 0.31, 0.07))


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return rng.integers([0, 40, 100], [256, 90, 256], (2500, 4, 5, 3)).astype(np.uint8)  # more than a chunk


def test_the_numbers_are_numpys(pixels):
    found = normalizer.measure(pixels)
    x = pixels.astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(found.mean, x.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, x.std((0, 1, 2)), rtol=1e-12)
    assert {type(number) for numbers in found for number in numbers} == {float}  # ready for JSON


def test_the_numbers_do_not_depend_on_the_order(pixels):
    assert normalizer.measure(pixels[::-1, ::-1]) == normalizer.measure(pixels)


def test_normalised_images_have_mean_0_and_std_1(pixels):
    x0 = np.asarray(normalizer.normalize(normalizer.measure(pixels), pixels), np.float64)
    np.testing.assert_allclose(x0.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x0.std((0, 1, 2)), 1, atol=1e-5)


def test_a_channel_without_contrast_is_refused(pixels):
    flat = pixels.copy()
    flat[..., 1] = 7
    with pytest.raises(ValueError, match=r"^data\.normalizer='mean_std': channel 1 is the same .*; use none"):
        normalizer.measure(flat)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("norm", [normalizer.IDENTITY, ODD], ids=["identity", "odd"])
def test_there_and_back_every_level_is_itself(norm, jit):
    there, back = (lambda x: normalizer.normalize(norm, x)), (lambda x: normalizer.denormalize(norm, x))
    there, back = (jax.jit(there), jax.jit(back)) if jit else (there, back)
    x0 = there(RAMP)
    assert x0.dtype == jnp.float32
    np.testing.assert_allclose(x0, (RAMP / 127.5 - 1 - np.array(norm.mean)) / np.array(norm.std), atol=1e-5)
    np.testing.assert_array_equal(back(x0), RAMP)


def test_without_a_normaliser_x0_is_the_image():
    np.testing.assert_array_equal(normalizer.normalize(normalizer.IDENTITY, RAMP), images.to_float(RAMP))


def test_the_bounds_are_black_and_white():
    low, high = normalizer.clip_bounds(ODD)
    x0 = normalizer.normalize(ODD, RAMP)
    np.testing.assert_allclose(low, x0[0, 0], rtol=1e-5)
    np.testing.assert_allclose(high, x0[-1, 0], rtol=1e-5)
    beyond = jnp.stack([low - 1, high + 1])
    np.testing.assert_array_equal(normalizer.denormalize(ODD, beyond), [[0] * 3, [255] * 3])
    assert normalizer.clip_bounds(normalizer.IDENTITY, 0.5) == (-0.5, 0.5)


@pytest.mark.parametrize("norm", [ODD, Normalizer((0.1,), (0.5,))], ids=["channels", "one for all"])
def test_the_determinant_is_that_of_the_jacobian(norm):
    shape = (2, 3, 3)

    def flat(x):
        return ((x.reshape(shape) - jnp.array(norm.mean)) / jnp.array(norm.std)).ravel()

    _, expected = np.linalg.slogdet(jax.jacobian(flat)(jnp.zeros(math.prod(shape))))
    np.testing.assert_allclose(normalizer.log_abs_det(norm, shape), expected, rtol=1e-5)
    assert normalizer.log_abs_det(normalizer.IDENTITY, shape) == 0


def test_densities_of_gaussian_images_agree_in_both_units():
    """log p(x) = log p(x0) + log|det|, for x0 standard normal and x ~ N(mean, std^2)."""
    shape, rng = (2, 2, 3), np.random.default_rng(0)
    mean, std = np.array(ODD.mean), np.array(ODD.std)
    x = mean + std * rng.normal(size=shape)

    def log_density(z):
        return -0.5 * (z**2 + math.log(2 * math.pi)).sum()

    expected = log_density((x - mean) / std) - np.log(np.broadcast_to(std, shape)).sum()
    found = log_density((x - mean) / std) + normalizer.log_abs_det(ODD, shape)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
