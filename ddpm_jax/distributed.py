"""Several processes, one run: how a process finds its peers. Nothing here may touch a device before they are joined."""

import importlib.util
import os
from collections.abc import Mapping

import jax

# A dead or frozen process ends the others after this time: the runtime aborts them, with exit status 134.
HEARTBEAT_TIMEOUT_SECONDS = 100
# How long the first process to finish waits for the others; process 0 has the last pictures to write.
SHUTDOWN_TIMEOUT_SECONDS = 100
START_TIMEOUT_SECONDS = 300

_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class StartError(ValueError):
    """The processes cannot be joined as asked; the message is one line with the flag and the remedy."""


def start(
    mode: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run through ``jax.distributed``; where there is one process only it does nothing.

    Args:
        mode: "auto" joins where the three following are given, in a Slurm step of several tasks, in an indexed
            Kubernetes job and on a Cloud TPU slice; "off" never does.
        coordinator: "host:port" of process 0.
        num_processes: how many there are.
        process_id: 0 .. num_processes - 1.

    Raises:
        StartError: some of the three are missing or make no sense, or the cluster does not say who the peers are.

    Peers that do not come within 5 minutes end the process as a peer's death does: the runtime aborts it.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        _check(mode, given)
    elif mode == "off" or not in_cluster(os.environ):
        return
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
    """Whether this process writes what all have computed. Unlike ``jax.process_index`` it touches no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


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
