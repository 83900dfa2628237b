"""Progress out of a compiled loop: a Python function that hears of each step as it ends."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# on_step is looked up by number when a step ends: as a static argument every new progress bar would compile the chain
# again.
_listeners: dict[int, Callable[[int], object]] = {}
_listener_numbers = itertools.count()


def run_with_listener(run: Callable[..., Any], on_step: Callable[[int], object]) -> Any:
    """``run(listener=number)``, waited for, while ``on_step`` hears what the program tells under that number."""
    number = next(_listener_numbers)
    _listeners[number] = on_step
    try:
        result = jax.block_until_ready(run(listener=jnp.int32(number)))
        jax.effects_barrier()
        return result
    finally:
        del _listeners[number]


def tell(number: jax.Array | None, i: jax.Array) -> None:
    """Inside a compiled loop: step ``i`` is done; nothing where no one listens."""
    if number is not None:
        jax.debug.callback(_tell_listener, number, i)


def _tell_listener(number: np.ndarray, i: np.ndarray) -> None:
    on_step = _listeners.get(int(number))
    if on_step is not None:
        on_step(int(i))
