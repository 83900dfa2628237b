"""Checkpoints through Orbax: asynchronous, atomic, restored onto today's shardings. The only module that imports it."""

import time
import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ddpm_jax.training.state import TrainState

_ITEM = "state"


def open_checkpoints(
    workdir: str, *, keep_last: int = 3, keep_every: int = 0, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints of a run, ``<workdir>/checkpoints/<step>``.

    Args:
        workdir: local, or any path that etils knows, such as gs://.
        keep_last: the newest ones to keep.
        keep_every: also keep every step that this divides; 0 is none.
        read_only: nothing is written, cleaned up or moved, so that a run in progress is not disturbed.
    """
    policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep_last)]
    if keep_every:
        policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    return ocp.CheckpointManager(
        epath.Path(workdir).resolve() / "checkpoints",
        # Named, because otherwise Orbax infers the layout from the newest directory, and an empty one hides all others.
        item_names=(_ITEM,),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=not read_only,
            read_only=read_only,
            # What read_only implies; said by us, because Orbax says it in a warning.
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
        ),
    )


def save(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    """Starts to save a state under its step; returns when it is copied off the device. A step that is there is kept."""
    step = int(state.step)
    if step not in checkpoints.all_steps():
        checkpoints.save(step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(state)}), force=True)


def restore_latest(
    checkpoints: ocp.CheckpointManager, abstract_state: TrainState, *, move_damaged: bool = True
) -> TrainState | None:
    """The newest state that can be read, on the shardings of ``abstract_state``; None where there is no checkpoint.

    A damaged checkpoint is passed over with a warning; so is one that any of several processes cannot read.

    Args:
        checkpoints: from ``open_checkpoints``.
        abstract_state: shapes, dtypes and shardings.
        move_damaged: move what was passed over to ``damaged_checkpoints/``. Whoever goes on to save needs this, because
            Orbax silently refuses to save a step below one that it sees.

    Raises:
        ValueError: there are checkpoints and none can be read; nothing is moved then.
    """
    damaged: list[tuple[int, str]] = []
    for step in _newest_first(checkpoints):
        state, reason = None, ""
        try:
            state = restore(checkpoints, step, abstract_state)
        except ValueError as error:
            reason = str(error)
        if not _all(state is not None):
            damaged.append((step, reason or f"checkpoint {step} is damaged (another process cannot read it)"))
            continue
        for bad_step, reason in damaged:
            where = "; moved to damaged_checkpoints/" if move_damaged else ""
            warnings.warn(f"{reason}{where}; using the one before it", stacklevel=2)
            if move_damaged:
                _move_aside(checkpoints, bad_step)
        if damaged:
            checkpoints.reload()
        return state
    if damaged:
        raise ValueError(
            f"{checkpoints.directory}: none of its {len(damaged)} checkpoints can be read: {damaged[0][1]}; "
            "restore one from a copy, or start in another workdir"
        )
    return None


def restore(checkpoints: ocp.CheckpointManager, step: int, abstract_state: Any) -> Any:
    """The state of one step, on the shardings of ``abstract_state``.

    Raises:
        ValueError: it cannot be read.
    """
    args = ocp.args.Composite(**{_ITEM: ocp.args.StandardRestore(abstract_state)})
    try:
        return checkpoints.restore(step, args=args)[_ITEM]
    except (jax.errors.JaxRuntimeError, TimeoutError):  # of a device, or of a peer that is gone; it may be whole
        raise
    except Exception as error:  # what the storage raises: OSError, ValueError, KeyError, …
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"checkpoint {step} is damaged ({reason})") from error


def _newest_first(checkpoints: ocp.CheckpointManager) -> list[int]:
    """The steps that process 0 sees: a shared file system may show the others an older listing."""
    steps = np.array(sorted(checkpoints.all_steps(), reverse=True), np.int32)
    if jax.process_count() > 1:
        count = int(multihost_utils.broadcast_one_to_all(np.int32(steps.size)))
        steps = multihost_utils.broadcast_one_to_all(np.resize(steps, count))
    return np.asarray(steps).tolist()


def _all(here: bool) -> bool:
    """Whether it holds on all processes."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(here)).all())


def _move_aside(checkpoints: ocp.CheckpointManager, step: int) -> None:
    directory = epath.Path(checkpoints.directory)
    if jax.process_index() == 0:
        target = directory.parent / "damaged_checkpoints" / f"{step}_{int(time.time())}"
        target.parent.mkdir(parents=True, exist_ok=True)
        (directory / str(step)).rename(target)
    multihost_utils.sync_global_devices(f"moved checkpoint {step} aside")
