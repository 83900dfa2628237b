"""``ddpm_jax.train`` for small networks: fsdp cuts small arrays too, and a step may be made to take PAUSE_SECONDS."""

import os
import time

from ddpm_jax import program, train, training
from ddpm_jax.training import mesh


class SlowLog(training.Log):
    """Time to be killed in."""

    def add(self, step, metrics):
        time.sleep(float(os.environ.get("PAUSE_SECONDS", 0)))
        super().add(step, metrics)


if __name__ == "__main__":
    mesh.MIN_SHARDED_SIZE = 512
    training.Log = SlowLog
    program.run(train.main, train.define_flags)
