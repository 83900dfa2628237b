"""The gradient of a step: in one piece, or in micro-batches that each device adds up before all meet."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ddpm_jax.training.mesh import batch_sharding
from ddpm_jax.training.state import Params

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# loss_fn(params, batch, keys [B]) -> (mean loss [], sums that are added up over micro-batches and reported)
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]
# gradient_fn(params, batch, keys [B]) -> ((mean loss [], sums), grads)
GradientFn = Callable[[Params, Batch, jax.Array], tuple[tuple[jax.Array, Metrics], Params]]


def whole_gradient(loss_fn: LossFn) -> GradientFn:
    """The gradient of all examples at once."""
    return jax.value_and_grad(loss_fn, has_aux=True)


def accumulated_gradient(loss_fn: LossFn, mesh: Mesh, param_shardings: Any, accumulate: int) -> GradientFn:
    """The gradient of the mean over B examples as the mean of those of ``accumulate`` micro-batches.

    Every example stays on its device. Under ``jit`` alone XLA reduces over the devices in each micro-batch; here the
    devices run on their own (``jax.shard_map``), on parameters gathered once, and reduce their sums once: over
    "fsdp" each device receives only the part of a gradient whose parameter it holds.

    Args:
        loss_fn: its mean is over the examples that it is given, so it is asked for B / accumulate / devices at a time.
        mesh: ("data", "fsdp").
        param_shardings: of the parameters, and so of the gradient.
        accumulate: A >= 1; the devices times A divide B.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings)
    whole, spread = PartitionSpec(), batch_sharding(mesh).spec
    parts = mesh.size * accumulate

    def on_device(params: Params, batch: Batch, keys: jax.Array) -> tuple[tuple[jax.Array, Metrics], Params]:
        (loss, sums), grads = _sum_of_micro_batches(loss_fn, params, batch, keys, accumulate)
        loss, sums = jax.lax.psum((loss, sums), mesh.axis_names)
        grads = jax.tree.map(lambda g, spec: _reduce(g, spec) / parts, grads, specs)
        return (loss / parts, sums), grads

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, spread, spread),
        out_specs=((whole, whole), specs),
        check_vma=False,  # checked, the gradient for replicated parameters would be reduced in every micro-batch
    )


def _sum_of_micro_batches(
    loss_fn: LossFn, params: Params, batch: Batch, keys: jax.Array, accumulate: int
) -> tuple[tuple[jax.Array, Metrics], Params]:
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def add(total: Any, micro_batch: tuple[Batch, jax.Array], params: Params = params) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *micro_batch)), None

    def add_in_turn(total: Any, micro_batch: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        # Without a loop XLA would begin with one before the last has been added, and hold the activations of both.
        total, ordered = jax.lax.optimization_barrier((total, params))
        return add(total, micro_batch, ordered)

    parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (batch, keys))
    shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # XLA for a CPU puts the gradients of convolutions into the order that is fast there outside of loops alone.
    return jax.lax.platform_dependent(
        zeros,
        parts,
        cpu=lambda zeros, parts: jax.lax.scan(add_in_turn, zeros, parts, unroll=accumulate)[0],
        default=lambda zeros, parts: jax.lax.scan(add, zeros, parts)[0],
    )


def _reduce(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over all devices; of an array that "fsdp" cuts, this device's part."""
    if "fsdp" not in spec:
        return jax.lax.psum(grad, ("data", "fsdp"))
    # Scattered first, so that only a part is left to be summed over "data".
    part = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
    return jax.lax.psum(part, "data")
