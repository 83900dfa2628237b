"""What the benchmarks share: contenders that take turns, and the machine's matmul peak to hold them against.

Machines are noisy, so no number here stands alone: all contenders of a table run in every round, in rotating order, and
a ratio compares two medians of the same rounds.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """The seconds of one contender, one number a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third, seconds."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def over(self, other: "Timing") -> tuple[float, float, float]:
        """How many times as long as ``other`` this took: ratio of the medians, and quartiles of the rounds' ratios."""
        rounds = Timing([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])
        return (self.median / other.median, *rounds.quartiles)


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Times the contenders strictly one after another, ``rounds`` times, each round beginning with another one.

    Args:
      contenders: each does its work and returns when that is done; what JAX arrays it returns are waited for.
      rounds: that count.
      warmup: rounds before them, which compile and do not count.
      prepare: what a contender does before its clock starts; waited for like the rest.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if prepare and name in prepare:
                jax.block_until_ready(prepare[name]())
            start = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


class Matmul(NamedTuple):
    """A large square matrix product: a contender whose FLOP/s are the machine's peak for whoever runs beside it."""

    run: Callable[[], jax.Array]
    flops: float


def matmul(dtype: Any, size: int | None = None) -> Matmul:
    """[N N] @ [N N] in ``dtype`` on the default device; N is 2,048 on a CPU and 8,192 elsewhere."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(jnp.matmul)
    return Matmul(lambda: product(a, a), 2.0 * size**3)


def milliseconds(timing: Timing) -> str:
    """ "12.3 [12.1 … 12.9]": median and quartiles."""
    first, third = timing.quartiles
    return f"{1e3 * timing.median:.1f} [{1e3 * first:.1f} … {1e3 * third:.1f}]"


def times(ratio: tuple[float, float, float]) -> str:
    """ "1.23 [1.20 … 1.31]": the ratio of medians and the quartiles over the rounds, see ``Timing.over``."""
    return f"{ratio[0]:.3f} [{ratio[1]:.3f} … {ratio[2]:.3f}]"


def machine() -> str:
    """One line on what the numbers were measured with, and on how busy the machine was already."""
    device = f"jax {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{device}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
