"""Several processes, one run: how a process finds its peers. Nothing may touch a device before they are joined."""

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

# A dead or frozen process ends the others after this time: the runtime aborts them, with exit status 134.
HEARTBEAT_TIMEOUT_SECONDS = 100
# How long the first process to finish waits for the others; process 0 has the last pictures to write.
SHUTDOWN_TIMEOUT_SECONDS = 100
START_TIMEOUT_SECONDS = 300
# How long a network file system may take to show one machine what another has written.
VISIBLE_WITHIN_SECONDS = 10

LOST_PEER = 134  # what the runtime's abort makes of a process whose peer died; the launch scripts start it again

# How collectives over a network say that the other end is gone; the runtime's heartbeat says nothing, it aborts.
_LOST_PEER = re.compile(
    r"gloo|nccl|coordination ?service|connection (reset|closed|refused)|broken pipe|barrier", re.IGNORECASE
)
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class StartError(ValueError):
    """The processes cannot work together as asked; the message is one line with what to change."""


def start(
    mode: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    saves: bool = False,
) -> None:
    """Joins the processes of a run through ``jax.distributed``; where there is one process only it does nothing.

    Args:
        mode: "auto" joins where the three following are given, in a Slurm step of several tasks, in an indexed
            Kubernetes job and on a Cloud TPU slice; "off" never does.
        coordinator: "host:port" of process 0.
        num_processes: how many there are.
        process_id: 0 .. num_processes - 1.
        saves: the program asks at each step whether SIGTERM has come to any process, to save first; without it the
            signal ends a process, as it ends one that is alone.

    Raises:
        StartError: some of the three are missing or make no sense, or the cluster does not say who the peers are.

    Peers that do not come within 5 minutes end the process as a peer's death does: the runtime aborts it.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        _check(mode, given)
    elif mode == "off" or not in_cluster(os.environ):
        return
    jax.config.update("jax_enable_preemption_service", saves)  # it takes the signal
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=START_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS,
        )
    except Exception as error:  # of a cluster's metadata service, of the name service, of JAX
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StartError(
            f"--distributed=auto: cannot join the other processes ({reason:.300}); give --coordinator, "
            "--num_processes and --process_id, or --distributed=off"
        ) from error


def in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether this process has peers that ``jax.distributed.initialize()`` finds by itself."""
    if all(name in environ for name in _SLURM_STEP):
        return int(environ["SLURM_NTASKS"]) > 1  # one task alone takes all GPUs; JAX would give it the first
    if int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return True
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:
        return "," in hosts
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "JOB_COMPLETION_INDEX" in environ
    # A TPU VM asks the metadata server for its peers. Importing jax set this variable where there is no TPU.
    return importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in environ


def is_first() -> bool:
    """Whether this process writes what all have computed; where it is alone, no device is touched to find out."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def first_says(answer: bool) -> bool:
    """The answer of process 0, on all: what decides who computes must not depend on what one machine sees."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def lost_peer(error: BaseException) -> bool:
    """Whether a process failed because another one is gone: a collective noticed before the heartbeat did.

    Or a checkpoint, whose processes wait for each other; its error may stand in front of the collective's.
    """
    if not jax.distributed.is_initialized():
        return False
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, jax.errors.JaxRuntimeError | TimeoutError) and _LOST_PEER.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def check_shared(workdir: str) -> None:
    """Refuses a workdir that not all processes see; called by all of them before anything is written there.

    Process 0 writes a file under a name that it has just drawn, and all look for it.

    Raises:
        StartError: on all processes, if one of them does not see it; nothing is left behind.
    """
    if jax.process_count() == 1:
        return
    path, drawn = epath.Path(workdir), np.frombuffer(os.urandom(16), np.uint32)
    probe, existed = path / f".shared_{drawn.tobytes().hex()}", path.exists()
    if is_first():
        with contextlib.suppress(OSError):  # then not even this process sees it
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()
    # Nobody learns the name before the file is there.
    name = f".shared_{np.asarray(multihost_utils.broadcast_one_to_all(drawn)).tobytes().hex()}"
    seen = np.asarray(multihost_utils.process_allgather(np.asarray(_appears(path / name)))).ravel()
    if is_first() and seen[0]:
        probe.unlink(missing_ok=True)
        if not existed and not seen.all():
            path.rmdir()
    if not seen[0]:
        raise StartError(f"{workdir}: process 0 cannot write there; choose another --workdir")
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(~seen)[:8]))
        raise StartError(
            f"{workdir}: is not the same place for all processes (what process 0 writes there, of {len(seen)} process "
            f"{blind} does not see); choose a --workdir that all machines share"
        )


def _appears(path: epath.Path) -> bool:
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while not path.exists():
        if is_first() or time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _check(mode: str, given: Mapping[str, str | int | None]) -> None:
    names = " ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if mode == "off":
        raise StartError(f"{names}: needs --distributed=auto")
    if missing:
        raise StartError(f"{names}: {' and '.join(missing)} missing; give all three, or none")
    coordinator, num_processes, process_id = given.values()
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdigit():
        raise StartError(f"--coordinator={coordinator}: must be host:port, such as 10.0.0.1:8476")
    if not 0 <= int(process_id or 0) < int(num_processes or 0):
        raise StartError(f"--process_id={process_id}: must be below --num_processes={num_processes}")
