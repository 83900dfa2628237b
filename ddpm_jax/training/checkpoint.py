"""Checkpoints through Orbax: asynchronous, atomic, restored onto today's shardings. The only module that imports it."""

import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

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
        ),
    )


def save(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    """Starts to save a state under its step; returns when it is copied off the device. A step that is there is kept."""
    step = int(state.step)
    if step not in checkpoints.all_steps():
        checkpoints.save(step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(state)}), force=True)


def restore_latest(
    checkpoints: ocp.CheckpointManager, abstract_state: TrainState, steps: Sequence[int] | None = None
) -> TrainState | None:
    """The newest state that can be read, on the shardings of ``abstract_state``; None where there is no checkpoint.

    A damaged checkpoint is passed over with a warning and, unless the checkpoints are read-only, moved aside to
    ``damaged_checkpoints/``, because Orbax refuses to save a step below one that it sees.

    Args:
        checkpoints: from ``open_checkpoints``.
        abstract_state: shapes, dtypes and shardings.
        steps: those to choose from; None is all.

    Raises:
        ValueError: there are checkpoints and none can be read; nothing is moved then.
    """
    damaged: list[tuple[int, str]] = []
    for step in sorted(checkpoints.all_steps() if steps is None else steps, reverse=True):
        try:
            state = restore(checkpoints, step, abstract_state)
        except Exception as error:  # Orbax raises what its storage raises: OSError, ValueError, KeyError, …
            damaged.append((step, str(error).strip().partition("\n")[0][:200]))
            continue
        for bad_step, reason in damaged:
            _pass_over(checkpoints, bad_step, reason)
        if damaged:
            checkpoints.reload()
        return state
    if damaged:
        raise ValueError(
            f"{checkpoints.directory}: none of its {len(damaged)} checkpoints can be read "
            f"(step {damaged[0][0]}: {damaged[0][1]}); restore one from a copy, or start in another workdir"
        )
    return None


def restore(checkpoints: ocp.CheckpointManager, step: int, abstract_state: Any) -> Any:
    """The state of one step, on the shardings of ``abstract_state``."""
    args = ocp.args.Composite(**{_ITEM: ocp.args.StandardRestore(abstract_state)})
    return checkpoints.restore(step, args=args)[_ITEM]


def _pass_over(checkpoints: ocp.CheckpointManager, step: int, reason: str) -> None:
    directory = epath.Path(checkpoints.directory)
    target = directory.parent / "damaged_checkpoints" / f"{step}_{int(time.time())}"
    movable = not checkpoints._options.read_only
    where = f"; moved to {target}" if movable else ""
    warnings.warn(f"checkpoint {step} is damaged ({reason}){where}; using the one before it", stacklevel=3)
    if movable and jax.process_index() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        (directory / str(step)).rename(target)
