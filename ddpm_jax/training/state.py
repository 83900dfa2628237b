"""What a run carries from step to step, and how it is born on its mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddpm_jax.training.mesh import replicated, state_shardings

Params = Any


class TrainState(NamedTuple):
    """Everything that a checkpoint holds; no key, since randomness is a function of (seed, step)."""

    step: jax.Array  # int32 []: optimizer steps taken, skipped ones included
    params: Params  # float32
    ema_params: Params  # float32, shaped as params
    opt_state: Any
    skipped_steps: jax.Array  # int32 []: steps whose loss or gradient was not finite


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 for some parameters; their average starts as a copy of them.

    The state holds ``params`` itself: a donated first step deletes the caller's arrays.
    """
    # Two zeros and a true copy, not the same array twice: a donated state must not hold a buffer under two names.
    ema_params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params), jnp.zeros((), jnp.int32))


def abstract_state(
    init_fn: Callable[[jax.Array], Params], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is computed."""
    shapes = jax.eval_shape(lambda key: new_state(init_fn(key), optimizer), jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def init_state(
    init_fn: Callable[[jax.Array], Params], optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array
) -> TrainState:
    """A new state, computed where it will lie: no device ever holds more than its share.

    Args:
        init_fn: ``init_fn(key) -> params``.
        optimizer: the optimizer.
        mesh: ("data", "fsdp").
        key: of the initial parameters.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(init_fn, optimizer, mesh))
    init = jax.jit(
        lambda key: new_state(init_fn(key), optimizer), in_shardings=replicated(mesh), out_shardings=shardings
    )
    return init(key)
