"""Several processes, one run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

from ddpm_jax import distributed
from ddpm_jax.distributed import StartError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
ELSEWHERE = {"TPU_SKIP_MDS_QUERY": "1"}  # what importing jax sets where there is no TPU


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}, False),  # in sbatch, not in srun
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_where_there_are_peers(environ, expected):
    assert distributed.in_cluster(ELSEWHERE | environ) is expected


@pytest.fixture
def initialized(monkeypatch):
    """What ``jax.distributed.initialize`` is called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: calls.append(kw))
    return calls


def test_one_process_initialises_nothing(initialized, monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    distributed.start()
    assert initialized == []
    assert distributed.is_first()


def test_slurm_is_left_to_jax_and_a_dead_peer_is_noticed_within_two_minutes(initialized, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.start("off")
    assert initialized == []
    distributed.start()
    [call] = initialized
    assert {call[name] for name in ("coordinator_address", "num_processes", "process_id")} == {None}
    assert call["heartbeat_timeout_seconds"] <= 110


def test_flags_are_passed_on(initialized):
    distributed.start("auto", "10.0.0.1:8476", 4, 3)
    [call] = initialized
    assert (call["coordinator_address"], call["num_processes"], call["process_id"]) == ("10.0.0.1:8476", 4, 3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("auto", "h:1", 2, None), ["--process_id missing"]),
        (("auto", None, None, 0), ["--coordinator and --num_processes missing"]),
        (("auto", "h", 2, 0), ["--coordinator=h", "host:port"]),
        (("auto", "h:1", 2, 2), ["--process_id=2", "--num_processes=2"]),
        (("off", "h:1", 2, 0), ["--coordinator=h:1", "--distributed=auto"]),
    ],
)
def test_a_mistake_is_named(initialized, arguments, parts):
    with pytest.raises(StartError) as error:
        distributed.start(*arguments)
    assert [part for part in parts if part not in str(error.value)] == []
    assert initialized == []


def test_an_error_of_the_runtime_is_one_line_and_never_swallowed(monkeypatch):
    def fail(**_):
        raise RuntimeError("Failed to recognize coordinator address nowhere\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(StartError, match=r"cannot join .*nowhere\); give --coordinator") as error:
        distributed.start("auto", "nowhere:1", 2, 0)
    assert "\n" not in str(error.value)


def test_programs_join_before_anything_else(run_program, tmp_path):
    results = run_program("ddpm_jax.sample", {"half": ["--num_processes=2"], "mode": ["--distributed=on"]}, tmp_path)
    assert "--coordinator and --process_id missing" in results["half"].error
    assert results["half"].code == 1
    assert "--distributed" in results["mode"].error
    assert results["mode"].code == 2


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error [10.0.0.2]:119: Connection reset by peer", True),
        ("INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error", True),
        ("UNAVAILABLE: failed to connect to all addresses; Connection refused", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes", False),
    ],
)
def test_a_collective_may_notice_a_dead_peer_first(monkeypatch, message, expected):
    error = jax.errors.JaxRuntimeError(message)
    assert not distributed.lost_peer(error)  # one process has none
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert distributed.lost_peer(error) is expected
    assert not distributed.lost_peer(ValueError(message))


def test_a_checkpoint_that_waits_for_a_lost_peer_says_so_too(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    # What Orbax says.
    waited = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    assert distributed.lost_peer(waited)
    assert not distributed.lost_peer(TimeoutError("the lock of the cache"))
    behind = RuntimeError("cannot close")
    behind.__context__ = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection reset by peer")
    assert distributed.lost_peer(behind)


# A workdir that not all processes share


@pytest.fixture
def of_three(monkeypatch):
    """``of_three(seen)``: this process is the first of three, which say whether they see its file."""
    looked = []

    def gather(mine):
        looked.append(bool(mine))
        return np.array([mine, *of_three.others])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda x: x)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)

    def of_three(*others):
        of_three.others = others
        return looked

    return of_three


def test_a_shared_workdir_is_left_as_it_was(of_three, tmp_path):
    looked = of_three(True, True)
    distributed.check_shared(str(tmp_path))
    assert looked == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_of_one_process_alone_is_refused_and_removed(of_three, tmp_path):
    of_three(True, False)
    with pytest.raises(StartError, match=r"run: is not the same place .* process 2 does not see\).*--workdir"):
        distributed.check_shared(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written_is_refused_by_all(of_three, tmp_path):
    of_three(False, False)
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"file/run: process 0 cannot write there; choose another --workdir"):
        distributed.check_shared(str(tmp_path / "file" / "run"))


def test_one_process_shares_with_nobody(tmp_path):
    distributed.check_shared(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


# Two processes


@pytest.fixture
def two(make_config, write_config_file, program_env, tmp_path):
    """``two(fields, flags)``: a tiny training in two processes of two devices each, through the launch script."""

    started = []

    def start(overrides: dict | None = None, *launch_flags: str) -> subprocess.Popen:
        fields = {"train.num_steps": 3, "train.checkpoint_every": 3, "train.sample_every": 3} | (overrides or {})
        config = write_config_file(tmp_path / "tiny.py", make_config(fields))
        command = ["bash", str(ROOT / "launch" / "local_processes.sh"), *launch_flags, "2"]
        command += [sys.executable, "-m", "ddpm_jax.train", "--config", str(config), "--workdir", str(tmp_path / "run")]
        env = program_env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, cwd=tmp_path, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:  # a test that failed leaves them running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def losses_of(workdir) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_and_only_the_first_speaks(two, trained, tmp_path):
    process = two()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    run = tmp_path / "run"
    np.testing.assert_allclose(losses_of(run), losses_of(trained.workdir)[:3], rtol=1e-4)
    assert [path.name for path in (run / "samples").iterdir()] == ["step_00000003.png"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert (run / "checkpoints" / "3").exists()
    assert err.count("finished at step 3") == 1
    # Nothing but Gloo's line of every device; its threads write it in pieces, so that lines are torn.
    gloo = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
    assert set(re.findall("[A-Za-z]+", out)) <= set(re.findall("[A-Za-z]+", gloo))


@pytest.mark.slow
def test_a_mistake_in_one_process_is_not_started_again(two, tmp_path):
    # Both are refused before the first step; neither may wait for the other.
    process, start = two({"data.source": "npz:absent.npz"}), time.monotonic()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "error: " in err
    assert "npz:absent.npz" in err
    assert "restart: " not in err
    assert time.monotonic() - start < 300


@pytest.mark.slow
def test_sigterm_saves_in_both(two, tmp_path):
    process = two({"train.num_steps": 100_000, "train.checkpoint_every": 100_000, "train.sample_every": 100_000})
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 500
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    assert err.count("the same command continues") == 1
    [saved] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved == len(losses_of(tmp_path / "run"))


# Joins its peer, then waits; at its second start it is done.
_WAITS = """
import os, sys, time
from ddpm_jax import program
def main():
    import jax
    folder = os.environ["FOLDER"]
    name = f"{folder}/{jax.process_index()}"
    if os.path.exists(name):
        return 0
    assert jax.process_count() == 2
    with open(f"{name}.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{name}.new", name)
    time.sleep(600)
program.run(main, lambda: None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "sent"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_dead_or_frozen_process_ends_its_peer_within_two_minutes_and_both_start_again(
    program_env, tmp_path, victim, sent
):
    (tmp_path / "waits.py").write_text(_WAITS)
    command = ["bash", str(ROOT / "launch" / "local_processes.sh"), "2", sys.executable, str(tmp_path / "waits.py")]
    env = program_env | {"FOLDER": str(tmp_path)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 300
            while not all((tmp_path / name).exists() for name in "01"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            pids = [int((tmp_path / name).read_text()) for name in "01"]
            os.kill(pids[victim], sent)
            killed = time.monotonic()
            while os.path.exists(f"/proc/{pids[1 - victim]}"):
                assert time.monotonic() - killed < 120
                time.sleep(0.1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[victim], signal.SIGKILL)  # the script waits for a frozen one
            _, err = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    exits = "137 134" if victim == 0 else "134 137"
    assert f"restart: exits {exits} (a process died" in err


@pytest.mark.slow
def test_sigterm_ends_a_program_that_has_nothing_to_save(program_env, tmp_path):
    """Only training asks for the signal; in other programs JAX's notifier would swallow it."""
    (tmp_path / "waits.py").write_text(_WAITS)
    command = ["bash", str(ROOT / "launch" / "local_processes.sh"), "--max-restarts", "0", "2", sys.executable]
    env = program_env | {"FOLDER": str(tmp_path)}
    process = subprocess.Popen([*command, str(tmp_path / "waits.py")], env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not all((tmp_path / name).exists() for name in "01"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
        deadline = time.monotonic() + 60  # an ended process stays in /proc until it has been reaped
        while any(os.path.exists(f"/proc/{(tmp_path / name).read_text()}") for name in "01"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
