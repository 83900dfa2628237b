"""What the training loop costs over the bare jitted step, and what checkpoints cost at a config's interval.

    python -m benchmarks.loop --config configs/digits.py --segment 50 --rounds 10

Runs the real ``ddpm_jax.train.train`` (data, batches to the device, metrics, progress), which reports its own
images/s a segment, in turns with segments of the same jitted step on a batch that stays on the device: where the loop
would save, it meets the bare segment instead, with its clock stopped. Then saves the state in turns with not saving:
a segment with a save at its beginning and the wait for it at its end, beside the segment alone.

Prints ms a step of both and the loop's overhead in %; then how long a save blocks, how much longer a segment with one
takes, and both as a share of ``train.checkpoint_every`` steps.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from typing import Any
from unittest import mock

import jax

from benchmarks import network, timing
from ddpm_jax import train, training
from ddpm_jax.config import Config


def loop_and_bare(config: Config, trainer: network.Trainer, segment: int, rounds: int) -> dict[str, timing.Timing]:
    """Seconds a step in the loop and bare, in turns; the first segment of each, which compiles, does not count."""
    bare: list[float] = []

    def run_bare(*_: Any) -> None:
        start = time.perf_counter()
        jax.block_until_ready(trainer.steps(segment))
        bare.append((time.perf_counter() - start) / segment)

    settings = dataclasses.replace(
        config.train,
        num_steps=segment * (rounds + 1),
        log_every=segment,
        checkpoint_every=segment,
        sample_every=segment * (rounds + 2),
        num_samples=1,
    )
    sampling = dataclasses.replace(config.sampling, num_steps=1)  # the loop ends with a picture
    config = dataclasses.replace(config, train=settings, sampling=sampling)
    with tempfile.TemporaryDirectory() as workdir, mock.patch.object(training, "save", run_bare):
        train.train(config, workdir)
        with open(os.path.join(workdir, "metrics.jsonl")) as lines:
            rates = [json.loads(line)["images_per_second"] for line in lines]
    in_loop = [settings.batch_size / rate for rate in rates]
    return {"loop": timing.Timing(in_loop[1:]), "bare": timing.Timing(bare[1 : rounds + 1])}


def checkpoints(trainer: network.Trainer, segment: int, rounds: int) -> dict[str, timing.Timing]:
    """Seconds of a segment alone, of one with a save, and of the part of the save that blocks."""
    blocked: list[float] = []
    with (
        tempfile.TemporaryDirectory() as workdir,
        training.open_checkpoints(workdir, keep_last=1) as manager,
    ):

        def with_save() -> None:
            jax.block_until_ready(trainer.state)
            start = time.perf_counter()
            training.save(manager, trainer.state)
            blocked.append(time.perf_counter() - start)
            jax.block_until_ready(trainer.steps(segment))
            manager.wait_until_finished()

        contenders = {"alone": lambda: trainer.steps(segment), "with a save": with_save}
        timings = timing.alternate(contenders, rounds)
    return timings | {"blocked": timing.Timing(blocked[-rounds:])}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py", help="(%(default)s)")
    parser.add_argument("--segment", type=int, default=50, help="steps (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(%(default)s)")
    args = parser.parse_args()
    config = network.load_config(args.config)
    trainer = network.Trainer(config)
    print(f"{timing.machine()}; {args.config}: {trainer.num_parameters:,} parameters, batch {config.train.batch_size}")

    steps = loop_and_bare(config, trainer, args.segment, args.rounds)
    for name, seconds in steps.items():
        print(f"  {name}: {timing.milliseconds(seconds)} ms a step")
    ratio = [100 * (x - 1) for x in steps["loop"].over(steps["bare"])]
    print(f"loop over bare step: {ratio[0]:+.2f} % [{ratio[1]:+.2f} … {ratio[2]:+.2f}]")

    saves = checkpoints(trainer, args.segment, args.rounds)
    every = config.train.checkpoint_every
    interval = every * steps["bare"].median
    blocked, whole = saves["blocked"].median, saves["with a save"].median - saves["alone"].median
    print(f"  a save blocks for {timing.milliseconds(saves['blocked'])} ms")
    print(f"  {args.segment} steps alone: {timing.milliseconds(saves['alone'])} ms, ", end="")
    print(f"with a save and the wait for it: {timing.milliseconds(saves['with a save'])} ms")
    print(f"checkpoints every {every} steps ({interval:.1f} s): blocked {blocked / interval:.2%}, ", end="")
    print(f"in all {whole / interval:.2%}")


if __name__ == "__main__":
    main()
