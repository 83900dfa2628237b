"""Kills a training again and again.

    python tests/cluster/soak.py --kills 50 [--processes 2] [--devices 2] [--seed 0]

A round starts the run, and at a random time kills a random process, or all of them, with SIGKILL: a third of the kills
come while the processes start, a third while they train, and a third while a checkpoint is written. The next round must
go on from the newest checkpoint that was finished. In the
end the run is left alone, and every loss must be that of an undisturbed run. Prints a line a round; exits with 1 where
a run does not go on, or loses a step that had been saved.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from processes import checkpoints, environment, errors, finish, losses, start

ROOT = Path(__file__).parents[2]
CONFIG = """
from ddpm_jax import config as c

def get_config():
    return c.Config(
        data=c.DataConfig(source="npz:{npz}", image_size=8, channels=1),
        model=c.ModelConfig(
            base_channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.0
        ),
        diffusion=c.DiffusionConfig(num_timesteps=30),
        optimizer=c.OptimizerConfig(learning_rate=1e-4),
        train=c.TrainConfig(
            batch_size=8, num_steps={steps}, log_every=1, checkpoint_every=3, keep_last=3, sample_every={steps},
            num_samples=8
        ),
        sampling=c.SamplingConfig(num_steps=3),
    )
"""


class Soak:
    """A run that is killed, and its twin that is not."""

    def __init__(self, folder: Path, processes: int, devices: int, steps: int, seed: int):
        self.folder, self.processes, self.devices, self.steps = folder, processes, devices, steps
        self.random = random.Random(seed)
        self.workdir, self.seconds_to_start = folder / "run", 10.0
        self.workdir.mkdir()
        np.savez(folder / "tiny.npz", images=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8))
        (folder / "tiny.py").write_text(CONFIG.format(npz=folder / "tiny.npz", steps=steps))
        self.env = environment(ROOT, str(folder / "cache"))

    def start(self, workdir: Path, processes: int, **env: str) -> list:
        """Processes of one run."""
        arguments = ["--config", str(self.folder / "tiny.py"), "--workdir", str(workdir)]
        return start(processes, self.devices, arguments, self.env | env, workdir)

    def round(self) -> str:
        """One start and one kill; what happened."""
        before = max(checkpoints(self.workdir), default=0)
        if not before:
            (self.workdir / "metrics.jsonl").unlink(missing_ok=True)  # so that its lines are those of this round
        processes, started = self.start(self.workdir, self.processes, PAUSE_SECONDS="0.2"), time.time()
        how = self.random.choice(["starting", "training", "saving"])
        if how == "starting":
            time.sleep(self.random.uniform(0, self.seconds_to_start))
        else:
            self.wait(lambda: self.began() if before else self.has_logged(), processes)
            self.wait(lambda: self.has_stepped(before, started), processes)
            self.seconds_to_start = time.time() - started
            if how == "saving":
                self.wait(lambda: self.is_saving(started), processes)
            else:
                time.sleep(self.random.uniform(0, 3))
        victims = self.random.choice([[x] for x in range(self.processes)] + [list(range(self.processes))])
        for i in victims:
            processes[i].kill()
        if len(victims) < self.processes and (how == "starting" or self.random.random() < 0.7):
            # The machine goes away before the others have noticed; whom nobody joins would wait for five minutes.
            time.sleep(self.random.uniform(0, 2))
            for process in processes:
                process.kill()
        statuses = finish(processes, 120)
        began = self.began()
        assert began == before or (how == "starting" and not began), f"went on at step {began}; {before} had been saved"
        # What the launch scripts start again; the runtime's own abort, and its exit, are two of them.
        assert set(statuses) <= {134, -signal.SIGABRT, -signal.SIGKILL}, f"{statuses}\n{errors(self.workdir)}"
        saved = max(checkpoints(self.workdir), default=0)
        return f"from {began}, killed {victims} while {how}, exits {statuses}, saved {saved}"

    def has_logged(self) -> bool:
        """Whether a step is in the log."""
        return (self.workdir / "metrics.jsonl").exists() and bool(losses(self.workdir))

    def has_stepped(self, before: int, since: float) -> bool:
        """Whether a step after ``before`` has been logged since a time."""
        log = self.workdir / "metrics.jsonl"
        return log.exists() and log.stat().st_mtime > since and max(losses(self.workdir), default=0) > before

    def is_saving(self, since: float) -> bool:
        """Whether a checkpoint is being written that was begun after a time."""
        try:
            return any(path.stat().st_mtime > since for path in self.workdir.glob("checkpoints/*tmp*"))
        except FileNotFoundError:  # it has just been finished
            return False

    def began(self) -> int:
        """The step that process 0 said it goes on from."""
        found = re.search(r"continues at step (\d+)", (self.workdir / "0.err").read_text())
        return int(found[1]) if found else 0

    def wait(self, condition, processes: list) -> None:
        """Until the condition holds; a run that ends before was not meant to."""
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline, f"nothing happened for 10 minutes\n{errors(self.workdir)}"
            if any(process.poll() is not None for process in processes):
                raise AssertionError(f"ended by itself: {finish(processes, 120)}\n{errors(self.workdir)}")
            time.sleep(0.01)

    def finish(self) -> float:
        """Runs to the end, and beside it an undisturbed run; the largest relative difference of their losses."""
        twin = self.folder / "twin"
        twin.mkdir()
        for workdir, number in ((self.workdir, self.processes), (twin, 1)):
            assert set(finish(self.start(workdir, number), 900)) == {0}, errors(workdir)
        found, expected = losses(self.workdir), losses(twin)
        assert list(found) == list(expected) == list(range(1, self.steps + 1))
        return max(abs(found[step] / expected[step] - 1) for step in expected)


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="of the run; left out, enough for the kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = args.steps or 40 * args.kills + 40
        soak = Soak(Path(folder), args.processes, args.devices, steps, args.seed)
        for number in range(1, args.kills + 1):
            try:
                print(f"{number}: {soak.round()}", flush=True)
            except AssertionError as error:
                sys.exit(f"kill {number}: {error}")
        print(f"{args.kills} kills; losses differ from an undisturbed run's by {soak.finish():.1e} at most")


if __name__ == "__main__":
    main()
