"""DDPM is DDIM (eta = 1) exactly where the formulas say so, and the variances are those of float64."""

import numpy as np
import pytest
from exact import run

from ddpm_jax import studies
from ddpm_jax.config import Config


def test_only_clipping_with_the_networks_own_eps_tells_them_apart():
    # Noises so large that the clipping works: half of the data lie outside [-0.3, 0.3].
    found = studies.equivalence(run(num_steps=50, clip_range=0.3), num_images=4)
    pairs = {name: pair["largest_difference"] for name, pair in found.numbers["pairs"].items()}
    assert pairs["no clipping"] < 1e-4
    assert pairs["clipped, eps re-derived"] < 1e-4
    assert pairs["clipped, the network's eps"] > 1e-2
    ddpm, ddim, apart = np.delete(np.delete(found.pictures.astype(int), 8, axis=2), 8, axis=3)  # the gray lines
    np.testing.assert_array_equal(np.abs(ddpm - ddim), apart)
    assert apart[:2].max() <= 1
    assert apart[2].max() > 1
    np.testing.assert_array_equal(ddpm[1], ddpm[2])  # one DDPM, twice shown


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_two_variances_are_one_number_up_to_the_precision(name):
    config = Config()
    config.diffusion.schedule = name
    found, apart = studies.variances(config), studies.disagreement(config)
    betas = {"linear": np.linspace(1e-4, 0.02, 1000)}.get(name)
    if betas is not None:
        ab = np.cumprod(1 - betas)
        posterior = (1 - np.append(1, ab[:-1])) / (1 - ab) * betas
        np.testing.assert_allclose(found["ddpm float64"], posterior, rtol=1e-12)
    assert {len(x) for x in found.values()} == {1000}
    assert {x[0] for x in found.values()} == {0.0}
    assert apart["DDPM's and DDIM's, float64"].max() < 1e-10
    assert 1e-6 < apart["DDPM's and DDIM's, float32"].max() < 0.1
    assert apart["here, from float64"].max() < 5e-5


def test_at_the_last_step_float32_says_what_the_write_up_saw():
    """ppdiffusers printed 0.01999998 for DDPM and 0.01999996 for DDIM; the truth is near both."""
    found = studies.variances(Config())
    assert found["ddpm float32"][-1] == pytest.approx(0.02, rel=1e-5)
    assert found["ddim float32"][-1] == pytest.approx(0.02, rel=1e-5)
    assert found["ddpm float32"][-1] != found["ddim float32"][-1]
