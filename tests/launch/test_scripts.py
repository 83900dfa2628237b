"""The launch scripts, with stand-ins for gcloud, kubectl, srun and scontrol that record how they are called."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
COMMAND = ["python", "-m", "ddpm_jax.train", "--config", "configs/cifar10.py", "--workdir", "gs://b/a run"]
SLICE = {"TPU_NAME": "slice", "ZONE": "us-west4-a"}

# Answers with the next line of <name>.replies, "EXIT OUTPUT", or with nothing and 0.
_STAND_IN = """#!/usr/bin/env python3
import json, os, pathlib, sys
here, name = pathlib.Path(__file__).parent, os.path.basename(__file__)
stdin = sys.stdin.read() if sys.argv[-1] == "-" else ""
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if stdin:
    (here / "stdin").write_text(stdin)
replies = here / f"{name}.replies"
lines = replies.read_text().splitlines() if replies.exists() else []
if lines:
    replies.write_text("".join(line + "\\n" for line in lines[1:]))
    code, _, output = lines[0].partition(" ")
    print(output) if output else None
    sys.exit(int(code))
"""


class Launcher:
    """Runs a script with the stand-ins on the PATH, and knows what they were called with."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("gcloud", "kubectl", "srun", "scontrol"):
            (folder / name).write_text(_STAND_IN)
            (folder / name).chmod(0o755)

    def env(self, **env: str) -> dict[str, str]:
        path = f"{self.folder}:{os.environ['PATH']}"
        waits = {"RESTART_PAUSE_SECONDS": "0", "POLL_SECONDS": "0"}
        return os.environ | {"PATH": path, "TMPDIR": str(self.folder)} | waits | env

    def replies(self, name: str, *lines: str) -> None:
        (self.folder / f"{name}.replies").write_text("".join(line + "\n" for line in lines))

    def __call__(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").unlink(missing_ok=True)
        command = ["bash", str(LAUNCH / script), *arguments]
        return subprocess.run(command, env=self.env(**env), capture_output=True, text=True, timeout=60, cwd=ROOT)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def launch(tmp_path) -> Launcher:
    return Launcher(tmp_path)


def script(path: Path, text: str) -> str:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    subprocess.run([SHELLCHECK, path], check=True)


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("tpu_vm.sh", ["create"], ["gcloud", "tpu-vm create slice", "--accelerator-type=v5litepod-8"]),
        ("tpu_vm.sh", ["copy"], ["git", "archive", "scp", "--worker=all"]),
        ("tpu_vm.sh", ["install"], ["--worker=all", "uv venv", ".[tpu]"]),
        ("tpu_vm.sh", ["run", *COMMAND], ["--worker=all", "launch/restart.sh", "ddpm_jax.train"]),
        ("tpu_vm.sh", ["follow"], ["--worker=0", "tail"]),
        ("tpu_vm.sh", ["stop"], ["--worker=all", "kill"]),
        ("tpu_vm.sh", ["resume", *COMMAND], ["delete", "create", "archive", "scp", "uv", "launch/restart.sh"]),
        ("tpu_vm.sh", ["delete"], ["tpu-vm delete slice"]),
        ("queued_resource.sh", ["create"], ["queued-resources create slice", "--node-id=slice"]),
        ("queued_resource.sh", ["resume", *COMMAND], ["describe", "delete", "create", "scp", "uv", "restart.sh"]),
        ("slurm.sbatch", COMMAND, ["srun", "ddpm_jax.train", "scontrol requeue"]),
        ("gke.sh", ["apply", *COMMAND], ["ddpm_jax.train", "kubectl apply"]),
        ("gke.sh", ["delete"], ["kubectl delete jobset run"]),
        ("local_processes.sh", ["2", *COMMAND], ["--num_processes 2 --process_id 0", "--process_id 1"]),
        ("restart.sh", COMMAND, ["ddpm_jax.train", "75, 134"]),
    ],
)
def test_a_dry_run_prints_what_it_would_run_and_runs_nothing(launch, name, arguments, parts):
    done = launch(name, "--dry-run", *arguments, **SLICE, NAME="run", IMAGE="image")
    assert done.returncode == 0, done.stderr
    rest = done.stdout + done.stderr
    for part in parts:  # in this order
        assert part in rest, done.stdout + done.stderr
        rest = rest[rest.index(part) :]
    assert launch.calls() == []


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("tpu_vm.sh", ["creat"], "choose one of create"),
        ("tpu_vm.sh", ["run"], "no command"),
        ("queued_resource.sh", [], "choose one of create"),
        ("slurm.sbatch", [], "no command"),
        ("gke.sh", ["apply"], "IMAGE"),
        ("local_processes.sh", ["two", "true"], "number of processes"),
        ("local_processes.sh", ["--dryrun", "2", "true"], "--dryrun: no such flag"),
        ("restart.sh", [], "no command"),
    ],
)
def test_a_mistake_ends_in_one_line(launch, name, arguments, part):
    done = launch(name, *arguments, **SLICE, NAME="run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert launch.calls() == []


def test_a_slice_has_to_be_named(launch):
    for name in ("tpu_vm.sh", "queued_resource.sh"):
        assert "TPU_NAME and ZONE are not set" in launch(name, "create").stderr


# Cloud TPU


def test_a_spot_slice_is_created_where_asked(launch):
    assert launch("tpu_vm.sh", "create", **SLICE, SPOT="1", ACCELERATOR_TYPE="v3-8").returncode == 0
    [call] = launch.calls()
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "slice"]
    assert {"--spot", "--accelerator-type=v3-8", "--zone=us-west4-a"} <= set(call)


def remote_command(call: list[str]) -> str:
    [command] = [argument for argument in call if argument.startswith("--command=")]
    return command.removeprefix("--command=")


def test_the_command_reaches_the_workers_word_for_word(launch, tmp_path):
    words = ["--tuple=(1, 2)", "a b", "$HOME & 'co'"]
    script(tmp_path / "print_words", 'printf "%s\\n" "$@"\n')
    assert launch("tpu_vm.sh", "run", "print_words", *words, **SLICE).returncode == 0
    [call] = launch.calls()
    assert "--worker=all" in call
    home = tmp_path / "home"  # a worker's, on which the repository was unpacked
    (home / "ddpm_jax").mkdir(parents=True)
    (home / "ddpm_jax" / "launch").symlink_to(LAUNCH)
    worker = launch.env(HOME=str(home))
    subprocess.run(["bash", "-c", remote_command(call)], env=worker, cwd=home, check=True, timeout=60)
    log, deadline = home / "ddpm_jax.log", time.monotonic() + 30
    while (not log.exists() or len(log.read_text().splitlines()) < len(words)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.read_text().splitlines() == words
    assert int((home / "ddpm_jax.pid").read_text()) > 1


def verbs(calls: list[list[str]]) -> list[str]:
    return [next(word for word in call if word in VERBS) for call in calls]


VERBS = ("create", "describe", "delete", "scp", "ssh")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("0 READY", ["describe", "ssh", "ssh"]),
        ("0 PREEMPTED", ["describe", "delete", "create", "scp", "ssh", "ssh"]),
        ("1 ", ["describe", "create", "scp", "ssh", "ssh"]),
    ],
)
def test_resume_makes_the_slice_anew_where_it_is_gone(launch, reply, expected):
    launch.replies("gcloud", reply)
    done = launch("tpu_vm.sh", "resume", *COMMAND, **SLICE)
    assert done.returncode == 0, done.stderr
    assert verbs(launch.calls()) == expected
    assert "ddpm_jax.train" in remote_command(launch.calls()[-1])


def test_resume_starts_nothing_on_a_slice_that_could_not_be_made(launch):
    launch.replies("gcloud", "0 PREEMPTED", "0 ", "1 no capacity")
    assert launch("tpu_vm.sh", "resume", *COMMAND, **SLICE).returncode == 1
    assert verbs(launch.calls()) == ["describe", "delete", "create"]


def test_a_queued_slice_is_waited_for(launch):
    launch.replies("gcloud", "0 WAITING_FOR_RESOURCES", "0 PROVISIONING", "0 ACTIVE")
    done = launch("queued_resource.sh", "wait", **SLICE)
    assert done.returncode == 0, done.stderr
    assert verbs(launch.calls()) == ["describe"] * 3
    launch.replies("gcloud", "0 FAILED")
    assert "error: slice is FAILED" in launch("queued_resource.sh", "wait", **SLICE).stderr
    launch.replies("gcloud", "1 ")
    done = launch("queued_resource.sh", "wait", **SLICE)
    assert done.returncode == 1
    assert "error: Google did not say" in done.stderr


def test_a_queued_slice_that_was_taken_back_is_queued_for_again(launch):
    launch.replies("gcloud", "0 SUSPENDED", "0 ", "0 ", "0 ACTIVE")
    done = launch("queued_resource.sh", "resume", *COMMAND, **SLICE)
    assert done.returncode == 0, done.stderr
    assert verbs(launch.calls()) == ["describe", "delete", "create", "describe", "scp", "ssh", "ssh"]


# Slurm


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (134, True), (137, True)])
def test_slurm_puts_back_a_job_that_may_go_on(launch, code, requeued):
    launch.replies("srun", f"{code} ")
    done = launch("slurm.sbatch", *COMMAND, SLURM_JOB_ID="7")
    step, *rest = launch.calls()
    assert step[0] == "srun"
    assert step[-len(COMMAND) :] == COMMAND
    assert rest == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert done.returncode == (0 if requeued else code)
    assert (f"exit {code}" in done.stderr) == requeued


def test_slurm_gives_up_after_so_many_restarts(launch):
    launch.replies("srun", "134 ")
    done = launch("slurm.sbatch", *COMMAND, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert done.returncode == 134
    assert [call[0] for call in launch.calls()] == ["srun"]


def test_slurm_sends_sigterm_before_the_time_is_over_and_lets_all_save():
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=TERM@300\n" in text  # without B: to the steps, not to the script
    assert "--kill-on-bad-exit=0" in text


# Kubernetes


def test_the_job_set_is_filled_in_and_applied(launch):
    words = [*COMMAND, '--tuple="a|b" & \\c']
    done = launch(
        "gke.sh", "apply", *words, NAME="cifar10", IMAGE="europe-docker.pkg.dev/p/r/ddpm_jax:1", CACHE="gs://b/c"
    )
    assert done.returncode == 0, done.stderr
    assert launch.calls() == [["kubectl", "apply", "-f", "-"]]
    job_set = yaml.safe_load((launch.folder / "stdin").read_text())
    assert job_set["kind"] == "JobSet"
    assert job_set["metadata"]["name"] == "cifar10"
    [group] = job_set["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert container["command"] == words
    assert container["image"] == "europe-docker.pkg.dev/p/r/ddpm_jax:1"
    assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://b/c"}]
    # Hosts and chips are those of the topology.
    x, y = map(int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == x * y / container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # what podFailurePolicy asks for


def exit_codes_rule():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    return spec, job, rule


def test_the_job_set_starts_again_after_an_abort_of_process_1():
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", sys.executable, "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, ""], check=False, capture_output=True).returncode:
        pytest.skip("unshare is not allowed here")
    done = subprocess.run([*command, "import os; os.abort()"], check=False, capture_output=True)
    code = done.returncode if done.returncode > 0 else 128 - done.returncode
    assert code in exit_codes_rule()[2]["onExitCodes"]["values"]


def test_the_job_set_starts_again_after_75_and_134_and_not_after_a_mistake():
    spec, job, rule = exit_codes_rule()
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert {75, 134, 137} <= set(rule["onExitCodes"]["values"])
    assert not {0, 1, 2} & set(rule["onExitCodes"]["values"])
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert job["backoffLimit"] == 0


# Restarts


@pytest.mark.parametrize(("code", "reason"), [(75, "saved"), (134, "a peer died"), (137, "killed")])
def test_restart_runs_again_while_that_helps(launch, tmp_path, code, reason):
    again = script(tmp_path / "again", f"echo x >> $RUNS; (($(wc -l < $RUNS) >= 3)) || exit {code}\n")
    done = launch("restart.sh", again, RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0
    assert (tmp_path / "runs").read_text() == "x\n" * 3
    assert len(done.stderr.splitlines()) == 2
    assert f"exit {code} ({reason}" in done.stderr.replace("the runtime aborted: ", "")


def test_restart_stops_at_a_mistake_and_at_its_limit(launch, tmp_path):
    for code, runs in ((1, 1), (75, 3)):
        count = tmp_path / f"runs{code}"
        command = script(tmp_path / "command", f'echo x >> "{count}"; exit {code}\n')
        done = launch("restart.sh", "--max-restarts", "2", command)
        assert done.returncode == code
        assert count.read_text() == "x\n" * runs
    assert "--max-restarts 2 is used up" in done.stderr


_SAVES = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.3)
    with (folder / "saved").open("a") as file:
        file.write("x\\n")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
with (folder / "started").open("a") as file:
    file.write("x\\n")
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "number"), [("restart.sh", 1), ("local_processes.sh", 2)])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_starts_nothing_again(launch, tmp_path, name, number, sent):
    (tmp_path / "saves.py").write_text(_SAVES)
    counts = [] if name == "restart.sh" else [str(number)]
    command = ["bash", str(LAUNCH / name), *counts, sys.executable, str(tmp_path / "saves.py"), str(tmp_path)]
    # Where the tests themselves run in the background of a shell, Ctrl-C is ignored, and so it would be in the script.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=launch.env(), stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() or (tmp_path / "started").read_text() != "x\n" * number:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved").read_text() == "x\n" * number
    assert (tmp_path / "started").read_text() == "x\n" * number


# Several processes on one machine

_PROCESS = """
while [[ $1 != --process_id ]]; do shift; done
n=$(($(cat "$FOLDER/$2" 2> /dev/null || echo 0) + 1))
echo $n > "$FOLDER/$2"
codes=($(cat "$FOLDER/codes.$n"))
exit "${codes[$2]}"
"""


@pytest.mark.parametrize(
    ("codes", "code", "restarts"),
    [
        (["0 0"], 0, 0),
        (["75 75", "0 0"], 0, 1),
        (["137 134", "75 75", "0 0"], 0, 2),
        (["1 134"], 1, 0),
        (["134 1"], 1, 0),
        (["134 2", "0 0"], 2, 0),
        (["75 75"] * 3, 75, 2),
    ],
)
def test_local_processes_are_started_again_together(launch, tmp_path, codes, code, restarts):
    for number, line in enumerate(codes, 1):
        (tmp_path / f"codes.{number}").write_text(line)
    command = script(tmp_path / "process", _PROCESS)
    done = launch("local_processes.sh", "--max-restarts", "2", "2", command, FOLDER=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert done.stderr.count("restart: ") == restarts
    assert [(tmp_path / str(i)).read_text().strip() for i in range(2)] == [str(restarts + 1)] * 2


def test_a_signal_between_two_starts_ends_it(launch, tmp_path):
    (tmp_path / "codes.1").write_text("134 134")
    env = launch.env() | {"FOLDER": str(tmp_path), "RESTART_PAUSE_SECONDS": "3"}
    command = ["bash", str(LAUNCH / "local_processes.sh"), "2", script(tmp_path / "process", _PROCESS)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        while "restart: " not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 134
    assert (tmp_path / "0").read_text().strip() == "1"
