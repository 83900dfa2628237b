"""``ddpm_jax.train`` for small networks: fsdp cuts small arrays too, and a step may be made to take PAUSE_SECONDS."""

import os
import time

import jax
from jax._src.distributed import global_state

from ddpm_jax import program, train, training
from ddpm_jax.training import mesh


class SlowLog(training.Log):
    """Time to be killed in."""

    def add(self, step, metrics):
        time.sleep(float(os.environ.get("PAUSE_SECONDS", 0)))
        super().add(step, metrics)


def compiled_together(make_train_step):
    """Nobody runs the step before all have compiled it: gloo gives CPUs 30 s to meet, too little on a busy machine."""

    def make(*args, **options):
        step, compiled = make_train_step(*args, **options), []

        def run(*arguments):
            if not compiled:
                compiled.append(step.lower(*arguments).compile())
                if jax.process_count() > 1:
                    global_state.client.wait_at_barrier("compiled", 600_000)
            return compiled[0](*arguments)

        return run

    return make


if __name__ == "__main__":
    mesh.MIN_SHARDED_SIZE = 512
    training.Log = SlowLog
    training.make_train_step = compiled_together(training.make_train_step)
    program.run(train.main, train.define_flags, saves=True)
