"""The memory that the compiled train step asks for, as ``--dry_run`` prints it, beside what the device then held.

    python -m benchmarks.memory --config configs/digits.py

Prints the step's peak by ``memory_analysis()`` (arguments, outputs that are not the donated state, temporaries), the
part of it that is state, and ``peak_bytes_in_use`` of the device after a few steps, with their ratio. The latter needs
a backend that counts (GPU and TPU do, the CPU does not), and includes whatever else lies there. The project's target:
within 10 %.
"""

import argparse
import os

# Does not change what is counted; leaves room for others on the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import network, timing
from ddpm_jax import training

MIB = 2**20


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py", help="(%(default)s)")
    parser.add_argument("--batch", type=int, help="in place of the config's")
    parser.add_argument("--steps", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    config = network.load_config(args.config)
    config.train.batch_size = args.batch or config.train.batch_size
    trainer = network.Trainer(config)
    setup = trainer.setup
    memory = training.step_memory(setup.train_step.lower(trainer.state, trainer.batch, setup.key).compile())
    print(f"{timing.machine()}; {args.config}: {trainer.num_parameters:,} parameters, batch {config.train.batch_size}")
    for name, size in memory.items():
        print(f"  {name + ':':<19}{size / MIB:,.1f} MiB")

    jax.block_until_ready(trainer.steps(args.steps))
    device = jax.local_devices()[0]
    measured = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if measured is None:
        print(f"  peak_bytes_in_use: the {device.platform} backend does not tell")
    else:
        print(f"  {'peak_bytes_in_use:':<19}{measured / MIB:,.1f} MiB, {measured / memory['peak']:.3f} of the above")


if __name__ == "__main__":
    main()
