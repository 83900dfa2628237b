"""The optimizer, all optax."""

from collections.abc import Callable

import jax
import optax

LearningRate = Callable[[jax.Array], jax.Array]


def make_learning_rate(peak: float, *, warmup_steps: int, decay: str, num_steps: int) -> LearningRate:
    """Linear from 0 to ``peak`` over warmup_steps, then constant, or half a cosine down to 0 at num_steps."""
    if decay not in ("constant", "cosine"):
        raise ValueError(f"optimizer.lr_decay={decay!r}: choose one of constant, cosine")
    if decay == "cosine":
        # optax wants the decay to end after the warm-up, also in a run that is shorter than its warm-up.
        last_step = max(num_steps, warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else peak, peak, warmup_steps, last_step)
    return optax.warmup_constant_schedule(0.0 if warmup_steps else peak, peak, warmup_steps)


def make_optimizer(
    learning_rate: LearningRate, *, weight_decay: float, grad_clip_norm: float
) -> optax.GradientTransformation:
    """AdamW (.9, .999, 1e-8), Adam where weight_decay = 0, after a clip of the global gradient's norm (0: none).

    The state has the same structure whatever the numbers are, so that a run may resume with others.
    """
    clip = optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(learning_rate, weight_decay=weight_decay))
