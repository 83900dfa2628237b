"""Classifier-free guidance: a wrapper of a denoiser, so that every sampler has it."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ddpm_jax.diffusion.variance import split_output


def guided(denoise_fn: Partial, label: jax.Array, null_label: int, guidance: float | jax.Array) -> Partial:
    """``denoise_fn(x_t, t)`` that returns out_null + w (out_label - out_null), w = ``guidance``.

    w = 1 is the plain conditional network, w = 0 the unconditional one. Ho & Salimans 2022 (eq. 6) write
    (1 + w') out_label - w' out_null: their w' is w - 1. Both halves go through one batched network call, side by side,
    so that each image and its twin stay on their device. Where the network has a second half of channels, for a learned
    variance, that is the conditional network's.

    Args:
        denoise_fn: ``denoise_fn(x_t, t, label)``.
        label: int32 [B], the classes wanted.
        null_label: the label that stands for none.
        guidance: w >= 0; an argument of the compiled sampler, not a constant in it.
    """
    denoise_fn = denoise_fn if isinstance(denoise_fn, Partial) else Partial(denoise_fn)
    return Partial(_guided, denoise_fn, label, jnp.full_like(label, null_label), jnp.asarray(guidance, jnp.float32))


def _guided(
    denoise_fn: Partial, label: jax.Array, null: jax.Array, guidance: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    def interleaved(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    output = denoise_fn(interleaved(x_t, x_t), interleaved(t, t), interleaved(null, label)).astype(jnp.float32)
    (out_null, _), (out_label, variance_output) = (split_output(half, x_t) for half in (output[0::2], output[1::2]))
    guided = out_null + guidance * (out_label - out_null)
    return guided if variance_output is None else jnp.concatenate([guided, variance_output], axis=-1)
