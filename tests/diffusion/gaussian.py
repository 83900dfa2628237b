"""What the tests compare with: float64 numpy, written from the papers and not from ddpm_jax.

Where the data are N(mu, s^2), E[x0 | x_t] is affine in x_t, so that the exact network output, every step of a chain,
and the mean and standard deviation of what comes out are known in closed form.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


def betas64(name, T, scale=True, start=1e-4, end=0.02):
    """The beta table, from the formula in the paper (Ho 2020 section 4, Nichol & Dhariwal 2021 eq. 17, DDIM's code)."""
    k = 1000 / T if scale else 1.0
    lo, hi = k * start, k * end
    i = np.arange(T, dtype=np.float64)
    if name == "linear":
        return lo + (hi - lo) * i / (T - 1)
    if name == "quadratic":
        return (math.sqrt(lo) + (math.sqrt(hi) - math.sqrt(lo)) * i / (T - 1)) ** 2
    if name == "sigmoid":
        return lo + (hi - lo) * (0.5 + 0.5 * np.tanh((-6 + 12 * i / (T - 1)) / 2))
    alpha_bars = {
        "cosine": np.cos(((i + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2,
        "offset_cosine": np.cos(math.acos(0.95) + (math.acos(0.02) - math.acos(0.95)) * i / (T - 1)) ** 2,
    }[name]
    return np.minimum(1 - alpha_bars / np.append(1.0, alpha_bars[:-1]), 0.999 if name == "cosine" else 1.0)


def alpha_bars64(name, T, **kwargs):
    """The alpha-bar table: the product of (1 - beta)."""
    return np.cumprod(1 - betas64(name, T, **kwargs))


def at(alpha_bars, t):
    """alpha_bar at t, with alpha_bar_{-1} = 1."""
    return 1.0 if t == -1 else alpha_bars[t]


def affine(prediction, alpha_bars, mu, s):
    """(a, b) [T] with E[target | x_t] = a_t x_t + b_t, for data N(mu, s^2); target is "eps", "x0" or "v"."""
    signal, noise = np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
    variance = alpha_bars * s**2 + 1 - alpha_bars
    x0 = signal * s**2 / variance, (1 - alpha_bars) * mu / variance
    eps = noise / variance, -noise * signal * mu / variance
    v = signal * eps[0] - noise * x0[0], signal * eps[1] - noise * x0[1]
    return {"x0": x0, "eps": eps, "v": v}[prediction]


def _apply(coefficients, x_t, t):
    a, b = (c[t].reshape(-1, *(1,) * (x_t.ndim - 1)) for c in coefficients)
    return a * x_t + b


def denoiser(prediction, alpha_bars, mu=0.3, s=0.5):
    """The exact network, as a Partial: (x_t, t) -> E[target | x_t]."""
    return Partial(_apply, tuple(jnp.asarray(c, jnp.float32) for c in affine(prediction, alpha_bars, mu, s)))


def bayes(alpha_bars, x0, x_t, t, t_prev):
    """Mean and variance of q(x_prev | x_t, x0), by multiplying two Gaussians in x_prev (precisions add)."""
    now, prev = at(alpha_bars, t), at(alpha_bars, t_prev)
    if t_prev == -1:
        return x0 + 0 * x_t, 0.0
    a = now / prev  # q(x_t | x_prev) = N(sqrt(a) x_prev, 1 - a); q(x_prev | x0) = N(sqrt(prev) x0, 1 - prev)
    precision = 1 / (1 - prev) + a / (1 - a)
    return (math.sqrt(prev) * x0 / (1 - prev) + math.sqrt(a) * x_t / (1 - a)) / precision, 1 / precision


@functools.partial(jax.jit, static_argnums=2)
def _normal(key, t, shape):
    return jax.random.normal(jax.random.fold_in(key, t), shape)


def noises(key, t, shape):
    """The noise that ``sample`` promises to draw: normal(fold_in(key, t)), float64 [S ...]; key is one or B keys."""
    if key.ndim == 1:
        return np.stack([noises(k, t, shape[1:]) for k in key], axis=1)
    return np.stack([np.asarray(_normal(key, one, shape), np.float64) for one in t])


def chain(
    alpha_bars, x_T, plan, noise, coefficients, *, prediction, method, eta=0.0, variance="", clip=None, rederive=True
):
    """The whole chain in float64. Returns x0 and the lists of x_t and of x0_hat."""
    x, xs, x0s = np.asarray(x_T, np.float64), [], []
    for i, (t, t_prev) in enumerate(zip(*plan, strict=True)):
        now, prev = at(alpha_bars, t), at(alpha_bars, t_prev)
        output = coefficients[0][t] * x + coefficients[1][t]
        # Solve x = sqrt(now) x0 + sqrt(1 - now) eps together with the definition of the output.
        signal, noise_rate = math.sqrt(now), math.sqrt(1 - now)
        row = {"x0": (1.0, 0.0), "eps": (0.0, 1.0), "v": (-noise_rate, signal)}[prediction]
        x0, eps = np.linalg.solve([[signal, noise_rate], row], np.stack([x.ravel(), output.ravel()]))
        x0, eps = x0.reshape(x.shape), eps.reshape(x.shape)
        if clip is not None:
            x0 = np.clip(x0, *clip)
            eps = (x - signal * x0) / noise_rate if rederive else eps
        xs.append(x)
        x0s.append(x0)
        if method == "ddpm":
            mean, small = bayes(alpha_bars, x0, x, t, t_prev)
            sigma = math.sqrt(small if variance == "fixed_small" or t_prev == -1 else 1 - now / prev)
        else:
            sigma = eta * math.sqrt((1 - prev) / (1 - now) * (1 - now / prev))
            mean = math.sqrt(prev) * x0 + math.sqrt(max(1 - prev - sigma**2, 0)) * eps
        x = mean + sigma * noise[i]
    return x, xs, x0s
