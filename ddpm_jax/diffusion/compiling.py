"""How the loops of this room are jitted: with options for XLA that the caller may give."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax


def compiled(*static_argnames: str) -> Callable[[Callable[..., Any]], Callable[[Mapping[str, str] | None], Any]]:
    """Decorates what is to be jitted: ``function(compiler_options)`` is then ``jax.jit`` of it, one for each options.

    The options are those of ``jax.jit``, which takes them at the top level only: inside another jit there are none.
    """

    def decorate(function: Callable[..., Any]) -> Callable[[Mapping[str, str] | None], Any]:
        @functools.cache
        def jitted(options: tuple[tuple[str, str], ...]) -> Any:
            return jax.jit(function, static_argnames=static_argnames, compiler_options=dict(options) or None)

        return lambda compiler_options: jitted(tuple(sorted((compiler_options or {}).items())))

    return decorate
