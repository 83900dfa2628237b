"""One optimizer step: a pure function of (state, batch, key)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from ddpm_jax.training.gradient import Batch, GradientFn, LossFn, Metrics, accumulated_gradient, whole_gradient
from ddpm_jax.training.mesh import replicated
from ddpm_jax.training.optimizer import LearningRate
from ddpm_jax.training.state import Params, TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    learning_rate: LearningRate,
    ema_decay: float,
    ema_start: int = 0,
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    gradient_of: Callable[[LossFn], GradientFn] = whole_gradient,
) -> tuple[TrainState, Metrics]:
    """Gradient, optimizer, average of the parameters.

    A step whose loss or gradient is not finite changes nothing but ``step`` and ``skipped_steps``: the next one meets
    another batch and other noise.

    Args:
        state: donated, where this is jitted by ``make_train_step``.
        batch: arrays [B ...].
        key: one key for the whole run; the step's own is ``fold_in(key, state.step)``.
        loss_fn: ``(params, batch, keys [B]) -> (loss [], sums)``, with one key an example.
        optimizer: optax.
        learning_rate: of the optimizer, for the metrics.
        ema_decay, ema_start: see ``ema_step``.
        prepare: what turns a batch as it was sent into examples, inside the program.
        gradient_of: the gradient of a loss_fn: ``whole_gradient``, or one that divides the batch.

    Returns:
        (state, metrics): the sums of loss_fn, loss, grad_norm (before clipping), learning_rate, skipped (0 or 1),
        skipped_steps.
    """
    batch = prepare(batch)
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, state.step)))(
        jnp.arange(num_examples)
    )
    (loss, sums), grads = gradient_of(loss_fn)(state.params, batch, keys)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def updated(state: TrainState) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = _stored(optax.apply_updates(state.params, updates))
        ema_params = ema_step(state.ema_params, params, state.step, decay=ema_decay, start=ema_start)
        return state._replace(params=params, ema_params=ema_params, opt_state=opt_state)

    kept = _updated_if(finite, updated, state)
    skipped = 1 - finite.astype(jnp.int32)
    new_state = kept._replace(step=state.step + 1, skipped_steps=state.skipped_steps + skipped)
    metrics = sums | {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate(state.step - state.skipped_steps)),
        "skipped": skipped,
        "skipped_steps": new_state.skipped_steps,
    }
    return new_state, metrics


def _updated_if(finite: jax.Array, updated: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
    """``updated(state)`` if ``finite``, else ``state``.

    A CPU branches, and then updates the donated state in place; a selection makes XLA copy most of it first. For a
    branch a GPU would wait until the host has read ``finite``.
    """
    return jax.lax.platform_dependent(
        state,
        cpu=lambda state: jax.lax.cond(finite, updated, lambda state: state, state),
        default=lambda state: jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated(state), state),
    )


def _stored(params: Params) -> Params:
    """On a CPU the average reads the new parameters, where XLA would compute them, and Adam's moments, once more."""
    barrier = functools.partial(jax.tree.map, jax.lax.optimization_barrier)
    return jax.lax.platform_dependent(params, cpu=barrier, default=lambda params: params)


def ema_step(ema_params: Params, params: Params, step: jax.Array, *, decay: float, start: int = 0) -> Params:
    """ema <- d ema + (1 - d) params, d = min(decay, (1 + step) / (10 + step)); a copy of params before step ``start``.

    Args:
        ema_params: the average, float32.
        params: the parameters after the step.
        step: int32 [], the steps before this one.
        decay: in [0, 1).
        start: in steps.
    """
    n = step.astype(jnp.float32)
    d = jnp.where(step < start, 0.0, jnp.minimum(decay, (1 + n) / (10 + n)))
    # In float32 1 - d is exact for d >= 1/2, so the two weights add up to one and an average does not drift.
    return optax.incremental_update(params, ema_params, 1 - d)


def make_train_step(
    mesh: Mesh,
    state_shardings: TrainState,
    batch_shardings: dict[str, NamedSharding],
    *,
    accumulate: int = 1,
    compiler_options: dict[str, str] | None = None,
    **options: Any,
) -> Any:
    """``train_step`` jitted over a mesh, the state donated: ``step(state, batch, key) -> (state, metrics)``.

    Args:
        mesh: ("data", "fsdp").
        state_shardings: of the state, in and out.
        batch_shardings: of each array of a batch as it is sent.
        accumulate: micro-batches a step; the mean of their gradients is that of the undivided batch.
        compiler_options: of ``jax.jit``, for XLA.
        options: of ``train_step``.
    """
    if accumulate > 1:
        options["gradient_of"] = functools.partial(
            accumulated_gradient, mesh=mesh, param_shardings=state_shardings.params, accumulate=accumulate
        )
    return jax.jit(
        functools.partial(train_step, **options),
        in_shardings=(state_shardings, batch_shardings, replicated(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def step_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device while a compiled step runs: the donated state, the temporaries, and the peak of all."""
    memory: Any = compiled.memory_analysis()
    donated, temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - donated + temporaries
    return {"state": donated, "temporaries": temporaries, "peak": peak}
