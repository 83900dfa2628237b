"""What the sampling studies draw, on the exact network."""

import jax.numpy as jnp
import numpy as np
import pytest
from exact import MU, STD, exact_x0, run

from ddpm_jax import images, studies
from ddpm_jax.config import ConfigError


def test_every_cell_of_the_grid_starts_from_the_same_noise():
    exact = run(clip_x0=False)
    found = studies.eta_by_steps(exact, [0.0, 1.0, "ddpm"], [10, 200], num_images=4, seed=2)
    assert found.pictures.shape == (3, 2, 17, 17, 1)
    assert (found.rows, found.columns) == (["eta 0", "eta 1", "DDPM, large"], ["10 steps", "200 steps"])
    x_T = np.asarray(studies.drawn_start(exact, 4, 2).x_T)[:4]
    limit = images.to_uint8(np.asarray(exact_x0(exact.schedule, x_T)))
    np.testing.assert_allclose(
        found.pictures[0, 1].astype(int), images.grid(limit, padding=1, background=128, scale=1)[1:-1, 1:-1], atol=4
    )
    away = np.array(found.numbers["rms_difference_from_longest"])
    assert (away[:, 1] == 0).all()
    assert away[0, 0] < 0.2 < away[1, 0]  # eta 0 keeps its picture, eta 1 does not


def test_a_cell_is_what_sample_draws():
    exact = run(method="ddpm", num_steps=10, variance="fixed_large")
    found = studies.eta_by_steps(exact, ["ddpm"], [10], num_images=1, seed=5)
    mine = studies.decode(exact, studies.drawn_start(exact, 1, 5))
    np.testing.assert_array_equal(found.pictures[0, 0], images.to_uint8(mine)[0])


def test_few_steps_come_nearer_to_the_flow():
    exact = run(clip_x0=False, spacing="linspace")
    found = studies.few_steps(exact, [1, 5, 20, 100], num_images=3, seed=1)
    assert found.pictures.shape == (4, 3, 8, 8, 1)
    assert found.rows[0] == "1 step"
    assert found.numbers["spacings"] == ["trailing", *["linspace"] * 3]
    away = found.numbers["rms_difference_from_longest"]
    assert away[0] > away[1] > away[2] > away[3] == 0
    # One step from pure noise is the mean of the data.
    np.testing.assert_allclose(found.pictures[0].astype(int), round((MU + 1) * 127.5), atol=2)


def test_eta_0_ends_in_the_same_bits_whatever_the_key():
    found = studies.determinism(run(), num_images=2)
    assert found.numbers["largest_difference"]["eta_0"] == 0
    assert found.numbers["largest_difference"]["eta_1"] > 0.1
    np.testing.assert_array_equal(found.pictures[0], found.pictures[1])


def test_the_chain_shows_what_the_network_saw_and_guessed():
    found = studies.chain(run(num_steps=20, clip_x0=False), num_images=2, num_frames=10, num_columns=4)
    assert found.frames.shape == (11, 4, 8, 8, 1)
    assert found.pictures.shape == (4, 5, 8, 8, 1)
    assert found.rows == ["x_t", "x0_hat"] * 2
    t = found.numbers["t"]
    assert (t[0], t[-1], found.columns[0], found.columns[-2:]) == (999, 49, "t = 999", ["t = 49", "x0"])
    np.testing.assert_array_equal(found.frames[-1, :2], found.frames[-1, 2:])  # x0 is its own guess
    np.testing.assert_array_equal(found.pictures[::2, -1], found.frames[-1, :2])
    np.testing.assert_array_equal(found.pictures[1::2, 0], found.frames[0, 2:])
    away = np.array(found.numbers["rms_of_x0_hat_from_x0"])
    assert (np.diff(away) < 0).all()
    assert away[0] == pytest.approx(STD, rel=0.5)  # the mean of the data, from data of this spread


def test_forward_is_the_closed_form_with_one_noise():
    config = run().config
    pixels = np.full((2, 8, 8, 1), 200, np.uint8)
    found = studies.forward(config, pixels, seed=1)
    assert found.numbers["t"] == [0, 250, 500, 750, 999]
    betas = np.linspace(1e-4, 0.02, 1000)
    signal = np.sqrt(np.cumprod(1 - betas)[[0, 250, 500, 750, 999]])
    np.testing.assert_allclose(found.numbers["signal_rate"], signal, rtol=1e-5)
    np.testing.assert_allclose(np.square(found.numbers["noise_rate"]) + signal**2, 1, rtol=1e-5)
    np.testing.assert_array_equal(found.pictures[:, 0], pixels)
    last = images.to_float(found.pictures[:, -1])
    first_noise = (images.to_float(found.pictures[:, 3]) - signal[2] * images.to_float(pixels)) / np.sqrt(
        1 - signal[2] ** 2
    )
    inside = (jnp.abs(last) < 0.95) & (jnp.abs(images.to_float(found.pictures[:, 3])) < 0.95)
    np.testing.assert_allclose(np.asarray(last)[inside], np.asarray(first_noise)[inside], atol=0.05)


def test_schedules_side_by_side():
    curves = studies.schedule_curves(200)
    numbers = studies.schedule_numbers(curves)
    assert numbers["t"] == [0, 50, 100, 150, 199]
    for name, curve in curves.items():
        np.testing.assert_allclose(curve.signal_rate**2 + curve.noise_rate**2, 1, rtol=1e-6)
        assert (np.diff(curve.log_snr) < 0).all(), name
    np.testing.assert_allclose(curves["offset_cosine"].signal_rate[[0, -1]], [0.95, 0.02], rtol=1e-5)
    with pytest.raises(ValueError, match="num_timesteps"):
        studies.schedule_curves(10)


def test_another_sampling_drops_what_belonged_to_the_old():
    config = run(eta=0.5, dynamic_threshold=0.9).config
    other = studies.with_sampling(config, method="heun", clip_x0=False)
    assert (other.sampling.eta, other.sampling.dynamic_threshold) == (0.0, 0.0)
    assert (config.sampling.eta, config.sampling.method) == (0.5, "ddim")
    with pytest.raises(ConfigError, match=r"sampling\.num_steps=1001: must lie in 1 .. 1000"):
        studies.with_sampling(config, num_steps=1001)
    with pytest.raises(ConfigError, match=r"sampling\.eta"):
        studies.with_sampling(config, method="heun", eta=0.5)


def test_the_run_s_own_offset_goes_where_it_does_not_fit():
    config = run(spacing="leading", steps_offset=3).config
    total = config.diffusion.num_timesteps
    assert studies.with_sampling(config, num_steps=10).sampling.steps_offset == 3
    assert studies.with_sampling(config, num_steps=total).sampling.steps_offset == 0
    with pytest.raises(ConfigError, match="steps_offset=3"):
        studies.with_sampling(config, num_steps=total, steps_offset=3)
    with pytest.raises(ConfigError, match="num_steps"):
        studies.with_sampling(config, num_steps=total + 1)
