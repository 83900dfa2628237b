"""Dynamic thresholding: against its formula, diffusers, and inside a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import alpha_bars64, denoiser

from ddpm_jax import diffusion

SCALES = np.array([0.2, 0.8, 1.5, 3, 9]).reshape(5, 1, 1, 1)
IMAGES = (SCALES * np.random.default_rng(0).normal(size=(5, 6, 4, 3))).astype(np.float32)
KEY = jax.random.key(0)


@pytest.mark.parametrize(("quantile", "cap"), [(0.995, None), (0.9, 1.5), (0.5, 1.0), (1.0, None)])
def test_threshold_is_the_formula_image_by_image(quantile, cap):
    found = diffusion.threshold(jnp.asarray(IMAGES), quantile, cap)
    for image, one in zip(IMAGES.astype(np.float64), found, strict=True):
        s = min(max(np.quantile(np.abs(image), quantile), 1), cap or np.inf)
        np.testing.assert_allclose(one, np.clip(image, -s, s) / s, atol=1e-5)
    assert float(jnp.abs(found).max()) <= 1 + 1e-6
    np.testing.assert_allclose(found[0], IMAGES[0], atol=1e-7)  # nothing leaves [-1, 1] there, and nothing is changed


def test_threshold_is_that_of_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    for quantile, cap in ((0.995, 1.0), (0.9, 2.0), (0.99, 100.0)):
        peer = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=cap)
        expected = peer._threshold_sample(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(diffusion.threshold(jnp.asarray(IMAGES), quantile, cap), expected, atol=1e-6)


def last_guess(**options):
    """x0_hat of a step that overshoots: the exact network of data far wider than [-1, 1]."""
    schedule, network = diffusion.make_schedule("linear"), denoiser("eps", alpha_bars64("linear", 1000), 0.0, 2.0)
    plan = (np.array([500]), np.array([-1]))
    return diffusion.sample(network, schedule, IMAGES, KEY, plan=plan, **options)


def test_a_chain_thresholds_where_it_would_clip():
    free = last_guess(clip_x0=False)
    assert float(jnp.abs(free).max()) > 2
    for quantile, cap in ((0.9, None), (0.99, 1.5)):
        found = last_guess(dynamic_threshold=quantile, max_threshold=cap)
        np.testing.assert_allclose(found, diffusion.threshold(free, quantile, cap), atol=1e-5)
    assert float(jnp.abs(found - last_guess()).max()) > 0.1


def test_other_bounds_move_as_the_range_of_images_does():
    """Images in other units, u = 3 + 2 x: the bounds are the units' black and white."""
    free = last_guess(clip_x0=False)
    clip = diffusion.clipping.make_clip((1.0, 5.0), 0.9, None, free.shape)
    found = diffusion.clipping.clipped(3 + 2 * free, clip)
    np.testing.assert_allclose(found, 3 + 2 * diffusion.threshold(free, 0.9), atol=1e-5)


def test_another_quantile_compiles_nothing_new():
    run = diffusion.samplers._run_chain(None)
    last_guess(dynamic_threshold=0.9)
    compiled = run._cache_size()
    last_guess(dynamic_threshold=0.8, max_threshold=3.0)
    assert run._cache_size() == compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_threshold": 0.0}, r"sampling\.dynamic_threshold=0\.0: must lie in \(0, 1\]"),
        ({"dynamic_threshold": 1.1}, r"sampling\.dynamic_threshold=1\.1"),
        ({"dynamic_threshold": 0.9, "clip_x0": False}, "clip_x0; switch it on"),
        ({"dynamic_threshold": 0.9, "max_threshold": 1.0}, r"sampling\.max_threshold=1\.0: must exceed 1"),
        ({"max_threshold": 2.0}, "set that too"),
    ],
)
def test_wrong_thresholds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        last_guess(**options)
