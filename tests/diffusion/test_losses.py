import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import alpha_bars64
from scipy import special

from ddpm_jax import diffusion

REFERENCE = {"l1": np.abs, "l2": np.square, "huber": lambda d: special.huber(1.0, d)}


def pair(shape=(4, 6, 5, 3), scale=1.5):
    rng = np.random.default_rng(0)
    return (scale * rng.normal(size=(2, *shape))).astype(np.float32)


@pytest.mark.parametrize("kind", diffusion.LOSSES)
def test_each_distance_as_a_mean_over_pixels_of_each_example(kind):
    prediction, target = pair()
    found = diffusion.loss(kind, jnp.asarray(prediction), jnp.asarray(target))
    expected = [REFERENCE[kind](p - q).mean() for p, q in zip(*pair().astype(np.float64), strict=True)]
    assert found.shape == (4,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", diffusion.LOSSES)
def test_a_larger_image_of_the_same_pixels_has_the_same_loss(kind):  # so a mean, not a sum
    prediction, target = (jnp.asarray(x) for x in pair())
    tiled = [jnp.tile(x, (1, 2, 3, 1)) for x in (prediction, target)]
    np.testing.assert_allclose(diffusion.loss(kind, *tiled), diffusion.loss(kind, prediction, target), rtol=1e-5)


@pytest.mark.parametrize("kind", diffusion.LOSSES)
def test_gradient_by_finite_differences(kind):
    prediction, target = (jnp.asarray(x) for x in pair((2, 2, 2, 1)))
    gradient = jax.grad(lambda p: diffusion.loss(kind, p, target).sum())(prediction)
    p, q, h = np.asarray(prediction, np.float64), np.asarray(target, np.float64), 1e-6
    expected = (REFERENCE[kind](p + h - q) - REFERENCE[kind](p - h - q)) / (2 * h) / 4
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_target_is_what_the_conversions_turn_into_x0(prediction):
    schedule, t = diffusion.make_schedule("linear"), jnp.array([3, 200, 500, 800])
    x0, eps = (jax.random.normal(jax.random.key(i), (4, 3, 3, 1)) for i in range(2))
    target = diffusion.target(prediction, schedule, x0, eps, t)
    ab = alpha_bars64("linear", 1000)[np.asarray(t)].reshape(-1, 1, 1, 1)
    expected = {"eps": eps, "x0": x0, "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0}[prediction]
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)
    x_t = diffusion.q_sample(schedule, x0, t, eps)
    np.testing.assert_allclose(diffusion.x0_from(prediction, schedule, target, x_t, t), x0, atol=1e-5)


def test_huber_is_quadratic_within_one_and_linear_beyond():
    d = jnp.array([[0.0], [0.5], [1.0], [-1.0], [3.0], [-1000.0]])
    np.testing.assert_allclose(diffusion.loss("huber", d, 0 * d), [0, 0.125, 0.5, 0.5, 2.5, 999.5], rtol=1e-6)


def test_bfloat16_outputs_are_compared_in_float32():
    prediction = jnp.full((1, 64, 64, 1), 1.0, jnp.bfloat16)  # in bfloat16 the sum of 4096 ones stops at 256
    found = diffusion.loss("l2", prediction, jnp.zeros((1, 64, 64, 1), jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert found.item() == 1.0


def test_a_batch_of_one_number_each_has_no_pixels_to_average():
    np.testing.assert_allclose(diffusion.loss("l2", jnp.array([1.0, 2.0]), jnp.zeros(2)), [1.0, 4.0])


def test_shapes_that_would_broadcast_and_unknown_kinds_are_refused():
    x = jnp.zeros((4, 8, 8, 3))
    for other in (x[..., :1], x[:1], x[0], x[:3]):
        with pytest.raises(ValueError, match=r"prediction \(4, 8, 8, 3\) and target"):
            diffusion.loss("l2", x, other)
    with pytest.raises(ValueError, match=r"'mse': choose one of l1, l2, huber"):
        diffusion.loss("mse", x, x)
    with pytest.raises(ValueError, match=r"'snr': choose one of uniform, min_snr"):
        diffusion.weight("snr", "eps", diffusion.make_schedule("linear"), jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_weights_follow_their_formula_at_every_t(name, prediction):
    schedule, ab = diffusion.make_schedule(name), alpha_bars64(name, 1000)
    t = jnp.arange(1000)
    uniform = diffusion.weight("uniform", prediction, schedule, t)
    assert uniform.dtype == jnp.float32
    assert (uniform == 1).all()
    snr = ab / (1 - ab)
    divisor = {"eps": snr, "x0": 1.0, "v": snr + 1}[prediction]  # Hang et al. 2023, section 3.4
    for kind, of_x0 in (("min_snr", np.minimum(snr, 5)), ("p2", snr / (1 + snr))):  # Choi et al. 2022, eq. 8
        found = diffusion.weight(kind, prediction, schedule, t)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, of_x0 / divisor, rtol=1e-6)
    found = diffusion.weight("min_snr", prediction, schedule, t, snr_gamma=1.5)
    np.testing.assert_allclose(found, np.minimum(snr, 1.5) / divisor, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("kind", diffusion.WEIGHTS)
def test_weights_are_finite_without_any_signal(kind, prediction):
    schedule = diffusion.make_schedule("cosine", num_timesteps=30)
    schedule = schedule._replace(
        alpha_bars=schedule.alpha_bars.at[-1].set(0), noise_levels=schedule.noise_levels.at[-1].set(1)
    )
    found = diffusion.weight(kind, prediction, schedule, jnp.array([29]))
    assert found.item() == (kind == "uniform")


@pytest.mark.parametrize("kind", ["min_snr", "p2"])
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_a_weight_of_the_snr_weighs_the_same_x0_error_whatever_is_predicted(kind, prediction):
    """weight x squared error of the output = w(SNR) x squared error of x0: the weights fit the conversions."""
    schedule, t = diffusion.make_schedule("cosine"), jnp.array([20, 200, 500, 800])
    x_t, output, error = (jax.random.normal(jax.random.key(i), (4, 3, 3, 1)) for i in range(3))
    x0, x0_off = (diffusion.x0_from(prediction, schedule, o, x_t, t) for o in (output, output + error))
    of_output = diffusion.weight(kind, prediction, schedule, t) * diffusion.loss("l2", output + error, output)
    of_x0 = diffusion.weight(kind, "x0", schedule, t) * diffusion.loss("l2", x0_off, x0)
    np.testing.assert_allclose(of_output, of_x0, rtol=1e-3)
