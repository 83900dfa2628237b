"""What the network is trained for: targets, distances and their weights over t."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.likelihood import BOUNDS, step_term
from ddpm_jax.diffusion.process import PREDICTIONS, unknown_prediction, x0_from
from ddpm_jax.diffusion.schedule import Schedule, rates
from ddpm_jax.diffusion.variance import model_log_variance

SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4
VLB_WEIGHT = 0.001  # Nichol & Dhariwal 2021, section 3.1


def loss(kind: str, prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Distance of each prediction from its target, mean over pixels, float32 [B].

    l1: |d|;  l2: d^2 (Ho et al. 2020, eq. 14);  huber: d^2 / 2 where |d| <= 1, |d| - 1/2 elsewhere.

    Args:
        kind: "l1", "l2" or "huber".
        prediction: network output [B ...].
        target: eps, x0 or v, shaped as prediction.

    Raises:
        ValueError: an unknown kind, or shapes that differ (which would broadcast silently).
    """
    if kind not in _DISTANCES:
        raise ValueError(f"diffusion.loss={kind!r}: choose one of {', '.join(_DISTANCES)}")
    if prediction.shape != target.shape:
        raise ValueError(f"loss: prediction {prediction.shape} and target {target.shape} must have the same shape")
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return _DISTANCES[kind](difference).mean(tuple(range(1, difference.ndim)))


def target(prediction: str, schedule: Schedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """What a network that predicts ``prediction`` should answer: eps, x0, or v = sqrt(ab) eps - sqrt(1 - ab) x0.

    Args:
        prediction: "eps", "x0" or "v" (Salimans & Ho 2022, section 4).
        schedule: the noise schedule.
        x0: clean images [B ...].
        eps: the noise in x_t, shaped as x0.
        t: int32 [B].
    """
    if prediction not in PREDICTIONS:
        raise unknown_prediction(prediction)
    if prediction == "v":
        now = rates(schedule, t, x0)
        return now.signal * eps - now.noise * x0
    return {"eps": eps, "x0": x0}[prediction]


def weight(kind: str, prediction: str, schedule: Schedule, t: jax.Array, *, snr_gamma: float = SNR_GAMMA) -> jax.Array:
    """Weight of each example's loss, float32 [B], from its timestep.

    uniform: 1, which for eps is L_simple (Ho et al. 2020, eq. 14).
    min_snr: w = min(SNR, snr_gamma), SNR = alpha_bar / (1 - alpha_bar), on the squared error of x0 (Hang et al. 2023,
    eq. 8).
    p2: w = SNR / (1 + SNR) on the squared error of x0, which is 1 / (1 + SNR)^1 on that of eps (Choi et al. 2022,
    eq. 8, k = 1 and gamma = 1): less for the faint noise that nobody sees.

    A w on the squared error of x0 is w / SNR on that of eps and w / (SNR + 1) on that of v.

    Args:
        kind: "uniform", "min_snr" or "p2".
        prediction: what the network predicts, "eps", "x0" or "v".
        schedule: the noise schedule.
        t: int32 [B].
        snr_gamma: where the weight of min_snr stops to grow, > 0; the others have none.
    """
    if kind not in _WEIGHTS:
        raise ValueError(f"diffusion.loss_weight={kind!r}: choose one of {', '.join(_WEIGHTS)}")
    if prediction not in PREDICTIONS:
        raise unknown_prediction(prediction)
    now = rates(schedule, t, t)
    return _WEIGHTS[kind](prediction, now.alpha_bar / now.noise_level, snr_gamma)


def variance_loss(
    schedule: Schedule,
    prediction: str,
    output: jax.Array,
    variance_output: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    bounds: tuple[Any, Any] = BOUNDS,
) -> jax.Array:
    """What a learned variance is trained for, to be added to the loss of the mean, float32 [B].

    L_hybrid = L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, section 3.1), L_vlb = T times the bound's term of the
    drawn t, in bits a dimension. No gradient reaches ``output``: the mean is left to L_simple.

    Args:
        schedule: the noise schedule.
        prediction: what ``output`` is: "eps", "x0" or "v".
        output: the first half of the network's channels [B ...].
        variance_output: the second half, shaped as output; see ``model_log_variance``.
        x0: clean images [B ...], each pixel one of 256 levels.
        x_t: noisy images, shaped as x0.
        t: int32 [B].
        bounds: the least and the greatest level, see ``decoder_term``.
    """
    output, variance_output = jax.lax.stop_gradient(output.astype(jnp.float32)), variance_output.astype(jnp.float32)
    x0_hat = x0_from(prediction, schedule, output, x_t, t)
    log_variance = model_log_variance("learned", schedule, x_t, t, t - 1, variance_output)
    return VLB_WEIGHT * schedule.num_timesteps * step_term(schedule, x0, x0_hat, log_variance, t, bounds=bounds)


def _huber(difference: jax.Array) -> jax.Array:
    size = jnp.abs(difference)
    return jnp.where(size <= 1, 0.5 * difference**2, size - 0.5)


_DISTANCES: dict[str, Callable[[jax.Array], jax.Array]] = {"l1": jnp.abs, "l2": jnp.square, "huber": _huber}
LOSSES = tuple(_DISTANCES)


def _uniform(prediction: str, snr: jax.Array, gamma: float) -> jax.Array:
    return jnp.ones_like(snr)


def _min_snr(prediction: str, snr: jax.Array, gamma: float) -> jax.Array:
    w = jnp.minimum(snr, gamma)
    return {"eps": jnp.minimum(1.0, gamma / snr), "x0": w, "v": w / (snr + 1)}[prediction]


def _p2(prediction: str, snr: jax.Array, gamma: float) -> jax.Array:
    w = 1 / (1 + snr)
    return {"eps": w, "x0": w * snr, "v": w * snr / (snr + 1)}[prediction]


# A new weighting is a function of what is predicted, the SNR and snr_gamma, and a line here.
_WEIGHTS: dict[str, Callable[[str, jax.Array, float], jax.Array]] = {
    "uniform": _uniform,
    "min_snr": _min_snr,
    "p2": _p2,
}
WEIGHTS = tuple(_WEIGHTS)
