"""A sampled chain beside its network calls alone: S steps of the one compiled scan, and S bare calls.

    python -m benchmarks.sampler --steps 50
    python -m benchmarks.sampler --base 64 --size 32 --mults 1 2 2 2 --steps 20       # the 9 M-parameter network

The bare calls are of the jitted ``denoise_fn``, each on the output of the one before, waited for at the end. The
chains are DDIM and DDPM, each with and without the ``on_step`` callback of a progress bar. All take turns. The
project's target: a chain within 5 % of its bare calls.

Prints ms a step, and chain / calls: the ratio of medians with the quartiles over the rounds.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import network, timing
from ddpm_jax import diffusion, experiment
from ddpm_jax.compiler import compiler_options


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network.add_flags(parser, base=32, size=16, batch=16, mults=(1, 2, 2), attention_at=8)
    parser.add_argument("--steps", type=int, default=50, help="S (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    args = parser.parse_args()
    config = network.make_config(args)
    model, schedule = experiment.make_model(config), experiment.make_schedule(config)
    params = jax.jit(experiment.make_init_fn(config, model))(jax.random.key(0))
    denoise_fn = experiment.make_denoise_fn(model, params, schedule)
    x_T = jax.random.normal(jax.random.key(1), (args.batch, *experiment.image_shape(config)))
    keys = jax.random.split(jax.random.key(2), args.batch)  # one an image, as `generate.draw` does
    t = jnp.full(x_T.shape[:1], 500)
    xla = compiler_options(jax.default_backend())
    denoise = jax.jit(lambda fn, x_t, t: fn(x_t, t), compiler_options=xla)

    def calls() -> jax.Array:
        x = x_T
        for _ in range(args.steps):
            x = denoise(denoise_fn, x, t)  # one after another, as in a chain; CPU backends overlap independent calls
        return x

    def chain(**options: Any) -> jax.Array:
        options |= {"num_steps": args.steps, "compiler_options": xla}
        return diffusion.sample(denoise_fn, schedule, x_T, keys, **options)

    contenders: dict[str, Callable[[], jax.Array]] = {"calls": calls}
    for method in ("ddim", "ddpm", "dpm++"):  # one call a step; heun makes two
        contenders[method] = functools.partial(chain, method=method)
        contenders[f"{method}, on_step"] = functools.partial(chain, method=method, on_step=lambda i: None)
    timings = timing.alternate(contenders, args.rounds)
    print(f"{timing.machine()}; {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {args.dtype}")
    print(f"{args.steps} steps of [{args.batch} {args.size} {args.size} 3], {args.rounds} rounds")
    for name, seconds in timings.items():
        a_step = timing.Timing([x / args.steps for x in seconds.seconds])
        ratio = "" if name == "calls" else f"   chain / calls {timing.times(seconds.over(timings['calls']))}"
        print(f"  {name:14}{timing.milliseconds(a_step):>28} ms a step{ratio}")


if __name__ == "__main__":
    main()
