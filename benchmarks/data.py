"""Images a second from a set in host memory: tf.data's server beside numpy's, flips on.

    python -m benchmarks.data

Serves random uint8 images, 32x32x3 and 64x64x3, in batches of 128 and of 512, as ``ddpm_jax.data.batches`` hands them
to the training loop: C-contiguous host arrays, ready for the device. All servers take turns; each first gives up the
batches that it made while the others ran. The project's targets, on two cores: 20,000 images/s at 32x32 and 10,000 at
64x64.

Prints a line a server: images/s from the median of the rounds, and from the quartiles.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import network, timing
from ddpm_jax import data

NUM_IMAGES = {32: 50_000, 64: 16_000}  # 150 and 190 MB
AHEAD = 16  # batches: more than a server keeps ready


def take(batches: Iterator[Any], count: int) -> Callable[[], None]:
    """A contender that takes ``count`` batches."""

    def run() -> None:
        for _ in itertools.islice(batches, count):
            pass

    return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=(128, 512), help="batch sizes (%(default)s)")
    parser.add_argument("--images", type=int, default=20_480, help="a round and server, about (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    args = parser.parse_args()

    sets = {size: network.random_images(count, size) for size, count in NUM_IMAGES.items()}
    contenders, prepare, images = {}, {}, {}
    for size, batch_size, use_tensorflow in itertools.product(sets, args.batches, (True, False)):
        name = f"{size}x{size}x3, batch {batch_size}, {'tf.data' if use_tensorflow else 'numpy'}"
        batches = data.batches(sets[size], seed=0, batch_size=batch_size, use_tensorflow=use_tensorflow)
        count = -(-args.images // batch_size)
        contenders[name], prepare[name] = take(batches, count), take(batches, AHEAD)
        images[name] = count * batch_size
    timings = timing.alternate(contenders, args.rounds, prepare=prepare)
    print(f"images/s, median [quartiles] of {args.rounds} rounds")
    for name, seconds in timings.items():
        first, third = seconds.quartiles
        low, high = images[name] / third, images[name] / first
        print(f"  {name:32}{images[name] / seconds.median:>10,.0f} [{low:,.0f} … {high:,.0f}]")


if __name__ == "__main__":
    main()
