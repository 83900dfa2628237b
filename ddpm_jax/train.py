"""Trains a run: ``python -m ddpm_jax.train --config configs/flowers.py [--workdir W] [--dry_run]``.

``--config.<field>=value`` overrides any field of the config.
The same command continues a run where it stopped. SIGTERM and Ctrl-C save first, and exit with 75 and 130.
"""

import contextlib
import json
import math
import os
import sys
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from ddpm_jax import config as config_lib
from ddpm_jax import data, distributed, experiment, generate, images, normalizer, program, training
from ddpm_jax.compiler import use_cores
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.experiment import RunError
from ddpm_jax.progress import progress
from ddpm_jax.setup import Setup
from ddpm_jax.training import TrainState

MAX_SKIPPED_IN_A_ROW = 20


def train(config: Config, workdir: str) -> TrainState:
    """Trains until step ``config.train.num_steps``, from the newest checkpoint in ``workdir`` where there is one.

    Raises:
        ConfigError, DataError, RunError, StartError: the config, the data or the workdir cannot be used; nothing was
            written.
        RunError: 20 steps in a row were not finite.
        training.Stopped: SIGTERM or Ctrl-C came; the state was saved first.
    """
    config_lib.validate(config)
    experiment.use_compilation_cache(config)
    with training.stop_signal() as stop:
        distributed.check_shared(workdir)
        config = experiment.with_normalizer_of_run(workdir, config)
        experiment.check_workdir(workdir, config)
        mesh = experiment.make_mesh(config)
        setup = Setup(config_lib.with_stand_in_normalizer(config), mesh)  # so that a mistake shows before the images
        image_set = _open_images(config)
        if config_lib.needs_measuring(config):
            config = config_lib.with_normalizer(config, *_measured(image_set))
            setup = Setup(config, mesh)
        with _open_checkpoints(config, workdir) as checkpoints:
            state = _restore_or_init(setup, checkpoints)
            experiment.write_config(workdir, config)
            state = _train_from(setup, state, image_set, workdir, checkpoints, stop)
    if jax.process_index() == 0:
        print(f"finished at step {int(state.step)}: {_samples_path(workdir, state)}", file=sys.stderr)
    return state


def _train_from(
    setup: Setup,
    state: TrainState,
    image_set: data.ImageSet | data.Stream,
    workdir: str,
    checkpoints: Any,
    stop: training.Stop,
) -> TrainState:
    """The loop."""
    settings, first_step = setup.config.train, int(state.step)
    with (
        contextlib.closing(_batches(setup.config, setup.mesh, image_set, first_step)) as batches,
        training.MetricsWriter(workdir, first_step, enabled=jax.process_index() == 0) as writer,
        training.Log(
            writer,
            first_step=first_step,
            num_steps=settings.num_steps,
            log_every=settings.log_every,
            batch_size=settings.batch_size,
        ) as log,
        training.Profile(
            os.path.join(workdir, "profile"),
            first=first_step + 1 + settings.profile_start,
            steps=settings.profile_steps,
            enabled=jax.process_index() == 0,
        ) as profile,
    ):

        def sample_is_due(step: int) -> bool:
            return step % settings.sample_every == 0 or step == settings.num_steps

        if (
            first_step
            and sample_is_due(first_step)
            and distributed.first_says(not _samples_path(workdir, state).exists())
        ):
            _write_samples(setup, state, workdir, writer)  # the run was killed between a checkpoint and its pictures
        for step in range(first_step + 1, settings.num_steps + 1):
            with profile.step(step, state):
                state, metrics = setup.train_step(state, next(batches), setup.key)
            log.add(step, metrics)
            diverged = log.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
            stopping = stop.is_set(step)  # asked once a step: a signal that comes after this waits for the next one
            if step % settings.checkpoint_every == 0 or step == settings.num_steps or diverged or stopping:
                with log.paused():
                    training.save(checkpoints, state)
            if diverged:
                raise RunError(_divergence(workdir, step))
            if stopping:
                checkpoints.wait_until_finished()
                raise training.Stopped(
                    f"saved step {step} of {settings.num_steps}; the same command continues", stop.exit_code
                )
            if sample_is_due(step):
                with log.paused():
                    _write_samples(setup, state, workdir, writer)
    return state


def _measured(image_set: data.ImageSet | data.Stream) -> normalizer.Normalizer:
    assert isinstance(image_set, data.ImageSet)  # `validate` asks a stream for its numbers
    try:
        return normalizer.measure(image_set.images)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None


def _open_images(config: Config) -> data.ImageSet | data.Stream:
    settings = config.data
    where: dict[str, Any] = {name: getattr(settings, name) for name in ("image_size", "channels", "split", "data_dir")}
    if settings.placement == "stream":
        stream = data.open_stream(settings.source, shuffle_buffer=settings.shuffle_buffer, **where)
        _check_labels(config, stream.has_labels, stream.labels)
        return stream
    image_set = data.load(settings.source, **where)
    _check_labels(config, image_set.labels is not None, image_set.labels)
    return image_set if config.model.num_classes else image_set._replace(labels=None)


def _check_labels(config: Config, has_labels: bool, labels: np.ndarray | None) -> None:
    """Those of a stream from TFDS are not known yet; ``stream_batches`` looks at them as they pass."""
    num_classes, source = config.model.num_classes, config.data.source
    if num_classes and not has_labels:
        raise ConfigError(f"config.model.num_classes={num_classes}: config.data.source={source!r} has no labels; use 0")
    if num_classes and labels is not None and (labels.min() < 0 or labels.max() >= num_classes):
        raise ConfigError(
            f"config.model.num_classes={num_classes}: the labels of config.data.source={source!r} go from "
            f"{labels.min()} to {labels.max()}; use {labels.max() + 1}"
        )


def _batches(config: Config, mesh: Mesh, image_set: data.ImageSet | data.Stream, first_step: int) -> Any:
    """Batches on the devices, from step ``first_step`` on; each process makes its own rows only."""
    batch_size, sharding = config.train.batch_size, training.batch_sharding(mesh)
    order: dict[str, Any] = {
        "seed": config.seed,
        "batch_size": batch_size,
        "first_step": first_step,
        "random_flip": config.data.random_flip,
        "rows": data.local_rows(sharding, batch_size),
    }
    if isinstance(image_set, data.Stream):
        streamed = data.stream_batches(image_set, num_classes=config.model.num_classes, **order)
        return data.device_batches(streamed, sharding, batch_size)
    if config.data.placement == "device":
        resident = data.put_images(image_set, training.replicated(mesh))
        return data.device_batches(data.index_batches(len(image_set.images), **order), sharding, batch_size, resident)
    use_tensorflow = data.needs_tensorflow(config.data.source)
    return data.device_batches(data.batches(image_set, use_tensorflow=use_tensorflow, **order), sharding, batch_size)


def _restore_or_init(setup: Setup, checkpoints: Any) -> TrainState:
    try:
        state = training.restore_latest(checkpoints, setup.abstract_state)
    except ValueError as error:
        raise RunError(str(error)) from None
    if state is None:
        return training.init_state(setup.init_fn, setup.optimizer, setup.mesh, setup.init_key)
    if jax.process_index() == 0:
        print(f"continues at step {int(state.step)} of {setup.config.train.num_steps}", file=sys.stderr)
    return state


def _open_checkpoints(config: Config, workdir: str) -> Any:
    try:
        return training.open_checkpoints(workdir, keep_last=config.train.keep_last, keep_every=config.train.keep_every)
    except OSError as error:
        raise RunError(f"{workdir}: cannot be written ({error}); choose another --workdir") from None


def _samples_path(workdir: str, state: TrainState) -> epath.Path:
    return epath.Path(workdir) / "samples" / f"step_{int(state.step):08d}.png"


def _write_samples(setup: Setup, state: TrainState, workdir: str, writer: training.MetricsWriter) -> None:
    """Pictures from the raw weights above those from their average; the noise never changes."""
    config = setup.config
    steps = 2 * config.sampling.num_steps
    halves = []
    with progress(steps, "sampling", "step") as bar:
        for params in (state.params, state.ema_params):
            drawn = generate.draw(
                config,
                setup.schedule,
                experiment.make_denoise_fn(setup.model, params, setup.schedule),
                setup.mesh,
                num_images=config.train.num_samples,
                seed=config.seed,
                on_step=lambda _: bar.update(1),
            )
            halves.append(drawn)
    if jax.process_index() == 0:
        columns = 2 ** math.ceil(math.log2(math.sqrt(2 * config.train.num_samples)))
        picture = np.concatenate([images.grid(half, columns=columns) for half in halves])
        images.save_png(_samples_path(workdir, state), picture)
        writer.image(int(state.step), "samples", picture)


def _divergence(workdir: str, step: int) -> str:
    return (
        f"the loss or its gradient was not finite in the last {MAX_SKIPPED_IN_A_ROW} steps, up to {step}; {workdir} "
        "holds the last good parameters: lower config.optimizer.learning_rate or look at config.dtype and the data"
    )


def dry_run(config: Config) -> None:
    """Prints the config, the parameters, the mesh and the memory of the compiled step. Opens no data set."""
    config_lib.validate(config)
    experiment.use_compilation_cache(config)
    mesh = experiment.make_mesh(config)
    setup = Setup(config_lib.with_stand_in_normalizer(config), mesh)
    print(json.dumps(config_lib.to_dict(config), indent=2))
    _print_parameters(setup.abstract_state.params)
    print(f"\nmesh: {dict(mesh.shape)} of {mesh.size} {mesh.devices.flat[0].device_kind} device(s)")
    print(f"dtype: {experiment.compute_dtype(config).name}")
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = setup.train_step.lower(setup.abstract_state, setup.abstract_batch(), key).compile()
    for name, size in training.step_memory(compiled).items():
        print(f"memory a device, {name}: {size / 2**20:,.1f} MiB")
    if config.data.placement == "device":
        print(f"  and {math.prod(experiment.image_shape(config)):,} bytes for each image of the data set")


def _print_parameters(params: Any) -> None:
    sizes: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        sizes[path[0].key] = sizes.get(path[0].key, 0) + math.prod(x.shape)
    width = max(map(len, sizes))
    print("\nparameters")
    for name, size in sizes.items():
        print(f"  {name:<{width}}  {size:>12,}")
    print(f"  {'total':<{width}}  {sum(sizes.values()):>12,}")


def define_flags() -> None:
    """The program's flags."""
    program.define_config()
    flags.DEFINE_string("workdir", None, "Where the run lives; runs/<name of the config> where left out.")
    flags.DEFINE_bool("dry_run", False, "Print config, parameters, mesh and memory, and stop.")


def main() -> None:
    """The program."""
    config, name = program.loaded_config()
    use_cores(config.train.batch_size // config.train.accumulate, even=True)
    if flags.FLAGS.dry_run:
        dry_run(config)
    else:
        train(config, flags.FLAGS.workdir or os.path.join("runs", name))


if __name__ == "__main__":
    program.run(main, define_flags, saves=True)
