"""Processes x devices: the same losses, the same pictures, and what becomes of a run when one of them dies."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from processes import checkpoints, errors, finish, losses, start

pytestmark = pytest.mark.slow

STEPS, EVERY = 20, 5
TIMEOUT = 900


@pytest.fixture(scope="module")
def run(make_config, write_config_file, program_env, tmp_path_factory):
    """``run(name, processes, devices, flags, **env)``: started; its workdir is ``run.workdir(name)``."""
    folder = tmp_path_factory.mktemp("cluster")
    fields = {
        "model.channel_mults": (1,),
        "model.dropout": 0.0,  # micro-batches draw other masks
        "optimizer.learning_rate": 1e-3,
        "train.batch_size": 16,
        "train.num_steps": STEPS,
        "train.checkpoint_every": EVERY,
        "train.keep_last": 10,
        "train.sample_every": STEPS,
        "train.num_samples": 8,
    }
    config = write_config_file(folder / "tiny.py", make_config(fields))

    def start_run(name, number, devices, *flags, **env):
        workdir = start_run.workdir(name)
        workdir.mkdir(exist_ok=True)
        arguments = ["--config", str(config), "--workdir", str(workdir), *flags]
        return start(number, devices, arguments, program_env | env, workdir)

    start_run.workdir = lambda name: folder / name
    return start_run


@pytest.fixture(scope="module")
def alone(run):
    """The workdir of the undisturbed run of one process on one device."""
    assert finish(run("alone", 1, 1), TIMEOUT) == [0], errors(run.workdir("alone"))
    return run.workdir("alone")


def picture(workdir):
    return np.asarray(Image.open(workdir / "samples" / f"step_{STEPS:08d}.png"), np.int32)


def assert_same_losses(workdir, expected):
    found, expected = losses(workdir), losses(expected)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5, atol=0)


def wait_for(condition, processes, workdir):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, errors(workdir)
        assert all(process.poll() is None for process in processes), errors(workdir)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "devices", "flags"),
    [
        (1, 8, []),
        (1, 8, ["--config.mesh.fsdp=2"]),
        (1, 8, ["--config.mesh.fsdp=4"]),
        (2, 4, []),
        (2, 4, ["--config.mesh.fsdp=2", "--config.train.accumulate=2"]),
        (2, 4, ["--config.mesh.fsdp=2"]),
        (2, 4, ["--config.mesh.fsdp=4"]),
        (4, 2, []),
        (4, 2, ["--config.mesh.fsdp=2"]),
        (4, 2, ["--config.mesh.fsdp=4", "--config.data.placement=device"]),
    ],
    ids=lambda x: " ".join(flag.rpartition(".")[2] for flag in x) if isinstance(x, list) else str(x),
)
def test_any_processes_and_devices_train_and_draw_the_same(run, alone, number, devices, flags):
    name = f"{number}x{devices}{''.join(flags)}".replace("/", "")
    processes, workdir = run(name, number, devices, *flags), run.workdir(name)
    assert finish(processes, TIMEOUT) == [0] * number, errors(workdir)
    assert_same_losses(workdir, alone)
    assert np.abs(picture(workdir) - picture(alone)).max() <= 1
    assert picture(alone).std() > 10


@pytest.mark.parametrize(
    "program",
    [
        ["ddpm_jax.evaluate", "likelihood", "--num_images=6"],
        ["ddpm_jax.explore", "determinism", "--num_images=3"],
        ["ddpm_jax.explore", "reconstruct", "--index=0", "--index=3"],
        ["ddpm_jax.explore", "chain", "--num_images=3"],
        ["ddpm_jax.sample", "--num_images=6", "--batch_size=4"],
    ],
    ids=lambda program: program[1] if not program[1].startswith("--") else program[0],
)
def test_what_is_done_with_a_run_does_not_depend_on_its_devices(alone, program_env, tmp_path, program):
    name, *arguments = program
    suffix = ".json" if "evaluate" in name else ".png"
    found = []
    for number, devices in ((1, 1), (1, 4), (2, 2)):
        logs = tmp_path / f"{number}x{devices}"
        logs.mkdir()
        flags = [*arguments, "--workdir", str(alone), "--out", str(logs / f"out{suffix}")]
        assert finish(start(number, devices, flags, program_env, logs, ("-m", name)), TIMEOUT) == [0] * number, errors(
            logs
        )
        found.append(results_in(logs))
    for pixels, numbers in found[1:]:
        assert np.abs(pixels - found[0][0]).max(initial=0) <= 1
        np.testing.assert_allclose(numbers, found[0][1], rtol=1e-3, atol=1e-5)
    assert found[0][0].size + found[0][1].size > 40


def results_in(folder):
    """The pixels and the numbers that a program has written."""
    pixels = [np.asarray(Image.open(path), np.int32).ravel() for path in sorted(folder.glob("*.png"))]
    numbers = [number for path in sorted(folder.glob("*.json")) for number in numbers_of(json.loads(path.read_text()))]
    return np.concatenate([np.zeros(0, np.int32), *pixels]), np.array(numbers, float)


def numbers_of(tree):
    if isinstance(tree, dict | list):
        return [x for part in (tree.values() if isinstance(tree, dict) else tree) for x in numbers_of(part)]
    return [tree] if isinstance(tree, int | float) else []


def test_sigterm_to_one_process_saves_in_both(run):
    processes, workdir = run("sigterm", 2, 1, PAUSE_SECONDS="0.5"), run.workdir("sigterm")
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(losses(workdir)) >= 2, processes, workdir)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes, TIMEOUT) == [75, 75], errors(workdir)
    stopped = max(losses(workdir))
    assert 2 <= stopped < STEPS
    assert checkpoints(workdir)[-1] == stopped
    assert f"saved step {stopped} of {STEPS}" in (workdir / "0.err").read_text()


def test_a_killed_run_goes_on_elsewhere_as_if_nothing_had_happened(run, alone):
    cut = "--config.mesh.fsdp=2"  # so that each process writes a part of the checkpoint that the other lacks
    processes, workdir = run("killed", 2, 4, cut, PAUSE_SECONDS="0.5"), run.workdir("killed")
    wait_for(lambda: 2 * EVERY in checkpoints(workdir), processes, workdir)
    processes[1].kill()
    killed = time.monotonic()
    statuses = finish(processes, 200)
    assert time.monotonic() - killed < 120
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] in (134, -signal.SIGABRT), errors(workdir)  # what the launch scripts start again
    saved = checkpoints(workdir)[-1]
    assert 2 * EVERY <= saved < STEPS
    assert finish(run("killed", 1, 2), TIMEOUT) == [0], errors(workdir)
    assert f"continues at step {saved} of {STEPS}" in (workdir / "0.err").read_text()
    assert_same_losses(workdir, alone)
    assert np.abs(picture(workdir) - picture(alone)).max() <= 1


def test_a_run_goes_on_with_more_processes_and_passes_over_a_damaged_checkpoint(run, alone):
    workdir = run.workdir("more")
    assert finish(run("more", 1, 2, f"--config.train.num_steps={2 * EVERY}"), TIMEOUT) == [0], errors(workdir)
    for path in (workdir / "checkpoints" / str(2 * EVERY)).rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert finish(run("more", 2, 4, "--config.mesh.fsdp=4"), TIMEOUT) == [0, 0], errors(workdir)
    said = (workdir / "0.err").read_text()
    assert f"checkpoint {2 * EVERY} is damaged" in said
    assert f"continues at step {EVERY} of {STEPS}" in said
    assert [path.name.partition("_")[0] for path in (workdir / "damaged_checkpoints").iterdir()] == [str(2 * EVERY)]
    assert_same_losses(workdir, alone)
    assert np.abs(picture(workdir) - picture(alone)).max() <= 1


def test_a_workdir_that_is_not_shared_is_refused_before_the_first_step(run, program_env, tmp_path):
    """Two processes with one relative workdir, each in a folder of its own."""
    config = next(run.workdir("x").parent.glob("tiny.py"))
    processes = []
    for i, port in enumerate([29_400 + time.time_ns() % 1000] * 2):
        (tmp_path / str(i)).mkdir()
        command = [sys.executable, "-m", "ddpm_jax.train", "--config", str(config), "--workdir", "run"]
        command += ["--coordinator", f"127.0.0.1:{port}", "--num_processes", "2", "--process_id", str(i)]
        with open(tmp_path / f"{i}.err", "w") as log:
            processes.append(subprocess.Popen(command, env=program_env, cwd=tmp_path / str(i), stderr=log))
    statuses = finish(processes, TIMEOUT)
    # Each ends at once; the runtime may be quicker than the line of the second.
    assert 1 in statuses
    assert 0 not in statuses
    line = (
        "error: run: is not the same place for all processes (what process 0 writes there, of 2 process 1 does not see)"
    )
    assert line in errors(tmp_path)
    assert [list((tmp_path / str(i)).iterdir()) for i in range(2)] == [[], []]
