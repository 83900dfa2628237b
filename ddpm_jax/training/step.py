"""One optimizer step: a pure function of (state, batch, key)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.training.mesh import batch_sharding, replicated
from ddpm_jax.training.optimizer import LearningRate
from ddpm_jax.training.state import Params, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# loss_fn(params, batch, keys [B]) -> (mean loss [], sums that are added up over micro-batches and reported)
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]


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
    split: Callable[[Any], Any] | None = None,
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
        split: cuts the examples into micro-batches [A B/A ...]; None takes them in one piece.

    Returns:
        (state, metrics): the sums of loss_fn, loss, grad_norm (before clipping), learning_rate, skipped (0 or 1),
        skipped_steps.
    """
    batch = prepare(batch)
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, state.step)))(
        jnp.arange(num_examples)
    )
    loss, sums, grads = _gradient(loss_fn, state.params, batch, keys, split)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = ema_step(state.ema_params, params, state.step, decay=ema_decay, start=ema_start)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    kept = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, ema_params, opt_state),
        (state.params, state.ema_params, state.opt_state),
    )
    skipped = 1 - finite.astype(jnp.int32)
    new_state = TrainState(state.step + 1, kept[0], kept[1], kept[2], state.skipped_steps + skipped)
    metrics = sums | {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate(state.step - state.skipped_steps)),
        "skipped": skipped,
        "skipped_steps": new_state.skipped_steps,
    }
    return new_state, metrics


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
    **options: Any,
) -> Any:
    """``train_step`` jitted over a mesh, the state donated: ``step(state, batch, key) -> (state, metrics)``.

    Args:
        mesh: ("data", "fsdp").
        state_shardings: of the state, in and out.
        batch_shardings: of each array of a batch as it is sent.
        accumulate: micro-batches a step; the mean of their gradients is that of the undivided batch.
        options: of ``train_step``.
    """
    split = None if accumulate == 1 else functools.partial(_micro_batches, mesh=mesh, accumulate=accumulate)
    return jax.jit(
        functools.partial(train_step, split=split, **options),
        in_shardings=(state_shardings, batch_shardings, replicated(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def step_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device while a compiled step runs: the donated state, the temporaries, and the peak of all."""
    memory: Any = compiled.memory_analysis()
    donated, temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - donated + temporaries
    return {"state": donated, "temporaries": temporaries, "peak": peak}


def _gradient(
    loss_fn: LossFn, params: Params, batch: Batch, keys: jax.Array, split: Callable[[Any], Any] | None
) -> tuple[jax.Array, Metrics, Params]:
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if split is None:
        (loss, sums), grads = gradient(params, batch, keys)
        return loss, sums, grads

    def add(total: Any, micro_batch: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *micro_batch)), None

    parts = split((batch, keys))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], parts))
    )
    ((loss, sums), grads), _ = jax.lax.scan(add, zeros, parts)
    accumulate = jax.tree.leaves(parts)[0].shape[0]
    return loss / accumulate, sums, jax.tree.map(lambda g: g / accumulate, grads)


def _micro_batches(examples: Any, *, mesh: Mesh, accumulate: int) -> Any:
    """[B ...] -> [A B/A ...]: each micro-batch takes its share from every device, and no example moves."""
    shards = mesh.size
    spread = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def split(x: jax.Array) -> jax.Array:
        per_shard = x.reshape(shards, accumulate, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(per_shard.reshape(accumulate, -1, *x.shape[1:]), spread)

    return jax.tree.map(split, examples)
