"""There and back, and between two noises, on the exact network."""

import jax
import numpy as np
import pytest
from exact import exact_x0, run

from ddpm_jax import images, studies

PIXELS = np.random.default_rng(0).integers(20, 200, (3, 8, 8, 1), np.uint8)


def test_the_error_of_reconstruction_falls_as_that_of_a_first_order_method():
    found = studies.reconstruct(run(clip_x0=True), PIXELS, [25, 50, 100, 200])
    mse = np.array(found.numbers["mse"])
    ratios = np.sqrt(mse[:-1] / mse[1:])
    assert ((ratios > 1.6) & (ratios < 2.4)).all(), mse
    assert found.numbers["paper"]["mse"][0] == 0.014
    assert "not measured here" in found.numbers["paper"]["source"]


def test_the_error_is_that_of_the_pictures_in_0_to_1():
    found = studies.reconstruct(run(), PIXELS, [10])
    shown = found.pictures.reshape(3, 2, 2, 8, 8, 1)
    np.testing.assert_array_equal(shown[:, 1, 0], PIXELS)
    assert (shown[:, 0, 0] == 255).all()
    of_pixels = np.mean(((shown[:, 1, 1].astype(float) - PIXELS) / 255) ** 2)
    assert found.numbers["mse"][0] == pytest.approx(of_pixels, abs=1e-4)
    assert (found.rows, found.columns) == (["its noise", "back again"] * 3, ["image", "10 steps"])


def test_interpolation_takes_the_flow_from_each_point_of_both_ways():
    exact = run(num_steps=200, clip_x0=False)
    found = studies.interpolate(exact, 5, seed=3)
    a, b = np.asarray(studies.drawn_start(exact, 2, 3).x_T)[:2]
    for i, w in enumerate(found.numbers["fractions"]):
        line = (1 - w) * a + w * b
        expected = images.to_uint8(np.asarray(exact_x0(exact.schedule, line)))
        np.testing.assert_allclose(found.pictures[1, i].astype(int), expected, atol=3)
        assert found.numbers["rms_of_noise"]["line"][i] == pytest.approx(np.sqrt(np.mean(line**2)), rel=1e-5)
    np.testing.assert_array_equal(found.pictures[0, [0, -1]], found.pictures[1, [0, -1]])
    ends = found.numbers["rms_of_noise"]["slerp"][0], found.numbers["rms_of_noise"]["slerp"][-1]
    assert min(ends) * 0.99 < found.numbers["rms_of_noise"]["slerp"][2] < max(ends) * 1.01
    assert found.numbers["rms_of_noise"]["line"][2] < 0.9 * min(ends)


def test_a_mix_begins_at_one_picture_and_ends_at_the_other():
    found = studies.mix(run(num_steps=200), PIXELS[:2], [0.0, 0.5, 1.0])
    assert found.pictures.shape == (1, 5, 8, 8, 1)
    a, at_0, half, at_1, b = found.pictures[0].astype(int)
    np.testing.assert_array_equal([a, b], PIXELS[:2])
    np.testing.assert_allclose(at_0, a, atol=8)
    np.testing.assert_allclose(at_1, b, atol=8)
    assert np.abs(half - a).max() > 20
    assert np.abs(half - b).max() > 20
    assert 0 < found.numbers["angle_between_noises"] < 180


def test_a_batch_that_is_there_is_spread_and_comes_back_whole():
    start = studies.given_start(np.arange(12, dtype=np.float32).reshape(3, 2, 2, 1), np.array([1, 0, 2]))
    assert len(start.x_T) % len(jax.devices()) == 0
    assert start.num_images == 3
    np.testing.assert_array_equal(np.asarray(start.labels)[:3], [1, 0, 2])
