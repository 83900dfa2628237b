"""Between two noises: the way along the sphere on which they lie."""

import jax
import jax.numpy as jnp

_SMALL_ANGLE = 1e-4  # below it, in float32, the quotient of two sines is worse than its limit


def slerp(a: jax.Array, b: jax.Array, weight: float | jax.Array) -> jax.Array:
    """Spherical linear interpolation, image by image  (Shoemake 1985; Song et al. 2021, appendix D.5).

    sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, theta the angle between a and b.
    Two Gaussian noises of many pixels have nearly the same norm and a right angle between them: the way from one to the
    other keeps the norm, and each point on it is as likely a noise as its ends. Halfway on the straight line the noise
    is 0.7 of what the network knows.

    Where a and b point the same way it is the straight line, the formula's limit. Where they point opposite ways there
    is no shortest way, and it takes one through a direction fixed by a.

    Args:
        a: [B ...], float.
        b: shaped as a.
        weight: w, [] or [B]; 0 is a, 1 is b.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    if a.shape != b.shape:
        raise ValueError(f"slerp: a has shape {a.shape}, b {b.shape}; give two of one shape")
    flat_a, flat_b = (x.reshape(a.shape[0], -1) for x in (a, b))
    w = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), a.shape[:1])[:, None]
    (unit_a, norm_a), (unit_b, norm_b) = _unit(flat_a), _unit(flat_b)
    # Not arccos of the product, which loses half of the digits where the two are nearly parallel (Kahan 2006).
    theta = 2 * jnp.arctan2(_norm(unit_a - unit_b), _norm(unit_a + unit_b))
    sine = jnp.maximum(jnp.sin(theta), _SMALL_ANGLE)
    arc = jnp.sin((1 - w) * theta) / sine * flat_a + jnp.sin(w * theta) / sine * flat_b
    line = (1 - w) * flat_a + w * flat_b
    half_turn = ((1 - w) * norm_a + w * norm_b) * (
        jnp.cos(w * jnp.pi) * unit_a + jnp.sin(w * jnp.pi) * _perpendicular(unit_a)
    )
    way = jnp.where(theta < _SMALL_ANGLE, line, jnp.where(theta > jnp.pi - _SMALL_ANGLE, half_turn, arc))
    return way.reshape(a.shape)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=-1, keepdims=True)


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    norm = _norm(x)
    return x / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny), norm


def _perpendicular(unit: jax.Array) -> jax.Array:
    """A unit vector at a right angle to each: pairs of coordinates turned by a quarter; an odd last one is left out."""
    even = unit.shape[-1] // 2 * 2
    pairs = unit[:, :even].reshape(unit.shape[0], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(unit.shape[0], even)
    return _unit(jnp.pad(turned, ((0, 0), (0, unit.shape[-1] - even))))[0]
