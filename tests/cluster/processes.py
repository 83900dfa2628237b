"""Several processes of one training on this machine, each with devices of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


def start(
    number: int, devices: int, arguments: list[str], env: dict[str, str], logs: Path, program: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts them; what process i says goes to ``logs/<i>.err``. They train, or run ``python *program``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = env | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    found = []
    for i in range(number):
        who = ["--coordinator", address, "--num_processes", str(number), "--process_id", str(i)] if number > 1 else []
        with open(logs / f"{i}.err", "w") as log:
            command = [sys.executable, *(program or (str(WORKER),)), *arguments, *who]
            found.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=log))
    return found


def finish(processes: list[subprocess.Popen], timeout: float) -> list[int]:
    """Their exit statuses, a signal as -number; whoever is there after ``timeout`` seconds is killed."""
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def errors(logs: Path) -> str:
    """The ends of all logs, for a message."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(logs.glob("*.err")))


def losses(workdir: Path) -> dict[int, float]:
    """The loss of each step, of whole lines only."""
    text = (workdir / "metrics.jsonl").read_text()
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {line["step"]: line["loss"] for line in lines}


def checkpoints(workdir: Path) -> list[int]:
    """The steps of the finished ones: while one is written its folder has another name."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def environment(root: Path, cache: str) -> dict[str, str]:
    """Of a process on the CPU that compiles quickly."""
    return os.environ | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
