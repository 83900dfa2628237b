"""Whole trainings: what a run leaves behind, how it stops, and how it goes on."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from ddpm_jax import compiler, experiment, generate, images, train, training
from ddpm_jax import config as config_lib
from ddpm_jax.config import ConfigError
from ddpm_jax.data import DataError
from ddpm_jax.experiment import RunError

pytestmark = pytest.mark.usefixtures("compilation_cache")

KEYS = ["step", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"]
KEYS += ["grad_norm", "learning_rate", "images_per_second", "skipped_steps"]


class Stub(nn.Module):
    """Stands in for the U-Net where the loop is on trial: compiles in a blink, and uses all that a U-Net uses."""

    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x_t, t, label=None, train=False):
        h = nn.Dense(4)(x_t) + nn.Dense(4)(jnp.sin(t.astype(jnp.float32))[:, None])[:, None, None]
        if self.num_classes:
            label = jnp.full(t.shape, self.num_classes) if label is None else label
            h += nn.Embed(self.num_classes + 1, 4)(label)[:, None, None]
        h = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(h))
        return nn.Dense(x_t.shape[-1])(h).astype(jnp.float32)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(experiment, "make_model", lambda config: Stub(config.model.num_classes, config.model.dropout))


def metrics_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def untimed(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def checkpoints_of(workdir) -> list[int]:
    return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").iterdir() if path.name.isdigit())


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_same_state(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def send_at(monkeypatch, step: int, number: int) -> None:
    """The process gets a signal as soon as a step is dispatched."""
    add = training.Log.add

    def add_and_send(self, this_step, metrics):
        add(self, this_step, metrics)
        if this_step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training.Log, "add", add_and_send)


# A run in one go


def test_metrics_hold_each_step_once_with_the_promised_keys(trained):
    lines = metrics_of(trained.workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(list(line) == KEYS for line in lines)
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_second"] > 0 for line in lines)
    np.testing.assert_allclose([line["learning_rate"] for line in lines], 1e-2, rtol=1e-6)
    assert {line["skipped_steps"] for line in lines} == {0}


def test_the_quarters_are_parts_of_the_loss(trained):
    for line in metrics_of(trained.workdir):
        quarters = [line[f"loss_q{i}"] for i in range(1, 5) if line[f"loss_q{i}"] is not None]
        assert min(quarters) - 1e-5 <= line["loss"] <= max(quarters) + 1e-5


def test_the_last_step_is_saved_and_sampled_whatever_the_intervals(trained):
    assert checkpoints_of(trained.workdir) == [5, 10, 12]
    assert sorted(path.name for path in (trained.workdir / "samples").iterdir()) == [
        "step_00000007.png",
        "step_00000012.png",
    ]


def test_a_sample_grid_shows_raw_above_ema(trained):
    with Image.open(trained.workdir / "samples" / "step_00000012.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        # Two grids of four images in a row, 8x8 enlarged to 64x64, with 2 pixels between them.
        assert picture.size == (4 * 66 + 2, 2 * (66 + 2))
        pixels = np.asarray(picture)
    mesh = training.make_mesh()
    for weights, shown in (("raw", pixels[:68]), ("ema", pixels[68:])):
        run = experiment.load(str(trained.workdir), weights=weights)
        drawn = generate.draw(run.config, run.schedule, run.denoise_fn, mesh, num_images=4, seed=run.config.seed)
        np.testing.assert_allclose(shown, images.grid(drawn, columns=4)[..., 0], atol=1)


def test_the_workdir_describes_the_run(trained):
    assert experiment.read_config(str(trained.workdir)) == trained.config
    assert list((trained.workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert {path.name for path in trained.workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "samples",
    }


def test_a_checkpoint_is_read_by_a_bare_orbax(trained):
    with ocp.CheckpointManager(trained.workdir / "checkpoints") as manager:
        assert manager.latest_step() == 12
        restored = manager.restore(12)
    state = restored.get("state", restored)
    assert int(state["step"]) == 12
    for name in ("params", "ema_params"):
        assert_same_state(jax.device_get(state[name]), getattr(trained.state, name))


def test_the_train_step_compiles_once(trained):
    assert trained.num_compilations == 1


def test_the_average_and_the_parameters_moved_apart(trained):
    params, average = jax.tree.leaves(trained.state.params), jax.tree.leaves(trained.state.ema_params)
    assert all(x.dtype == np.float32 for x in params + average)
    assert any((x != y).any() for x, y in zip(params, average, strict=True))
    assert int(trained.state.step) == 12


# Stopping and going on


def test_sigterm_then_the_same_command_equals_one_go_bit_for_bit(trained, make_config, tmp_path, monkeypatch):
    workdir, handlers = str(tmp_path / "run"), [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        send_at(patch, 6, signal.SIGTERM)
        with pytest.raises(training.Stopped) as stopped:
            train.train(make_config(), workdir)
    assert stopped.value.exit_code == 75
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoints_of(workdir) == [5, 6]

    state = train.train(make_config(), workdir)
    assert_same_state(jax.device_get(state), trained.state)
    assert untimed(metrics_of(workdir)) == untimed(metrics_of(trained.workdir))
    last = "samples/step_00000012.png"
    assert (tmp_path / "run" / last).read_bytes() == (trained.workdir / last).read_bytes()


def test_ctrl_c_saves_and_exits_with_130(stub, make_config, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    send_at(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(training.Stopped) as stopped:
        train.train(make_config(), workdir)
    assert stopped.value.exit_code == 130
    assert checkpoints_of(workdir) == [3]
    assert "saved step 3 of 12" in str(stopped.value)


def test_a_signal_at_any_moment_loses_no_step(stub, make_config, tmp_path, monkeypatch):
    # Between the question whether to save and the question whether to stop there must be no gap: here the signal
    # comes right after the first of them.
    asked = []

    def is_set(stop, step):
        asked.append(stop)
        stop.exit_code = 75 if len(asked) > 1 else 0
        return stop.exit_code != 0

    monkeypatch.setattr(training.Stop, "is_set", is_set)
    workdir = tmp_path / "run"
    with pytest.raises(training.Stopped) as stopped:
        train.train(make_config({"train.checkpoint_every": 12}), str(workdir))
    assert f"saved step {checkpoints_of(workdir)[-1]} of 12" in str(stopped.value)


def test_a_finished_run_is_left_alone_but_for_its_missing_pictures(trained, make_config, tmp_path):
    workdir = Path(trained.copy_to(tmp_path / "run"))
    (workdir / "samples" / "step_00000012.png").unlink()
    state = train.train(make_config(), str(workdir))
    assert_same_state(jax.device_get(state), trained.state)
    before, after = files_of(trained.workdir), files_of(workdir)
    assert {name for name in after if not name.startswith("tensorboard") and after[name] != before.get(name)} == set()
    assert set(before) <= set(after)


def test_a_run_measures_its_normaliser_once_and_keeps_it(stub, make_config, npz_path, tmp_path):
    """The numbers are those of the images that it began with, whatever it is continued with."""
    fields, workdir = {"train.num_steps": 2, "data.normalizer": "mean_std"}, str(tmp_path / "run")
    config = make_config(fields)
    train.train(config, workdir)
    with np.load(npz_path) as archive:
        x = archive["images"] / 127.5 - 1
        np.savez(tmp_path / "dark.npz", images=archive["images"] // 4, labels=archive["labels"])
    kept = experiment.read_config(workdir).data
    np.testing.assert_allclose((kept.mean, kept.std), ([x.mean()], [x.std()]), rtol=1e-9)
    assert config == make_config(fields)  # the caller's own is left alone
    dark = {"data.source": f"npz:{tmp_path / 'dark.npz'}", "train.num_steps": 3}
    with pytest.warns(UserWarning, match="other batches"):
        train.train(make_config(fields | dark), workdir)
    assert experiment.read_config(workdir).data == dataclasses.replace(kept, source=dark["data.source"])
    for other, words in (
        ({"data.mean": (0.0,), "data.std": (1.0,)}, r"data\.mean: .* != \(0\.0,\)"),
        ({"data.normalizer": "none"}, "data.normalizer: 'mean_std' != 'none'"),
    ):
        with pytest.raises(RunError, match=words):
            train.train(make_config(fields | other), workdir)


def test_images_without_contrast_have_no_normaliser(stub, make_config, tmp_path):
    np.savez(tmp_path / "gray.npz", images=np.full((9, 8, 8), 7, np.uint8), labels=np.zeros(9, int))
    fields = {"data.normalizer": "mean_std", "data.source": f"npz:{tmp_path / 'gray.npz'}"}
    with pytest.raises(ConfigError, match=r"^config\.data\.normalizer='mean_std': channel 0 is the same"):
        train.train(make_config(fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_may_be_prolonged(stub, make_config, tmp_path):
    workdir = str(tmp_path / "run")
    train.train(make_config({"train.num_steps": 4}), workdir)
    state = train.train(make_config({"train.num_steps": 7}), workdir)
    once = train.train(make_config({"train.num_steps": 7}), str(tmp_path / "once"))
    assert_same_state(jax.device_get(state), jax.device_get(once))
    assert [line["step"] for line in metrics_of(workdir)] == list(range(1, 8))


def test_a_damaged_newest_checkpoint_is_passed_over(trained, make_config, tmp_path):
    workdir = Path(trained.copy_to(tmp_path / "run"))
    for path in (workdir / "checkpoints" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (workdir / "checkpoints" / "11.orbax-checkpoint-tmp-7").mkdir()  # what a kill leaves behind
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    with pytest.warns(UserWarning, match="checkpoint 12 is damaged"):
        state = train.train(make_config(), str(workdir))
    assert_same_state(jax.device_get(state), trained.state)
    assert 12 in checkpoints_of(workdir)
    assert_same_state(jax.device_get(experiment.load(str(workdir), step=12).params), trained.state.ema_params)
    assert untimed(metrics_of(workdir)) == untimed(metrics_of(trained.workdir))
    assert [path.name.split("_")[0] for path in (workdir / "damaged_checkpoints").iterdir()] == ["12"]


def test_a_newest_checkpoint_without_contents_is_passed_over(trained, make_config, tmp_path):
    workdir = Path(trained.copy_to(tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "12")
    (workdir / "checkpoints" / "12").mkdir()
    with pytest.warns(UserWarning, match="checkpoint 12 is damaged"):
        state = train.train(make_config(), str(workdir))
    assert_same_state(jax.device_get(state), trained.state)


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_keeps_them(stub, make_config, tmp_path):
    workdir = tmp_path / "run"
    train.train(make_config({"train.num_steps": 2}), str(workdir))
    shutil.rmtree(workdir / "checkpoints" / "2" / "state")
    before = files_of(workdir / "checkpoints")
    with pytest.raises(RunError, match="none of its 1 checkpoints can be read"):
        train.train(make_config({"train.num_steps": 3}), str(workdir))
    assert files_of(workdir / "checkpoints") == before
    assert not (workdir / "damaged_checkpoints").exists()


def test_only_the_last_few_and_every_nth_checkpoint_are_kept(stub, make_config, tmp_path):
    fields = {"train.checkpoint_every": 1, "train.keep_last": 2, "train.keep_every": 4, "train.num_steps": 10}
    train.train(make_config(fields), str(tmp_path / "run"))
    assert checkpoints_of(tmp_path / "run") == [4, 8, 9, 10]


# Refusals


def test_the_workdir_of_another_model_or_diffusion_is_refused(trained, make_config, tmp_path):
    workdir = trained.copy_to(tmp_path / "run")
    before = files_of(workdir)
    other = make_config({"model.base_channels": 16, "diffusion.prediction": "eps", "data.random_flip": False})
    with pytest.raises(RunError) as caught:
        train.train(other, workdir)
    message = str(caught.value)
    assert "model.base_channels: 8 != 16" in message
    assert "diffusion.prediction: 'v' != 'eps'" in message
    assert "random_flip" not in message
    assert "\n" not in message
    assert files_of(workdir) == before


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"data.source": "npz:/absent.npz"}, DataError, "no such file"),
        ({"data.source": "somewhere"}, DataError, "data.source='somewhere'"),
        ({"data.source": "UNLABELLED"}, ConfigError, r"config\.model\.num_classes=3: .* no labels; use 0"),
        ({"model.num_classes": 2}, ConfigError, r"config\.model\.num_classes=2: .* from 0 to 2; use 3"),
        ({"train.accumulate": 3}, ConfigError, r"config\.train\.accumulate=3"),
        ({"mesh.fsdp": 64}, ConfigError, r"config\.mesh\.fsdp=64"),
        ({"model.attention": "cudnn"}, ConfigError, r"config\.model\.attention='cudnn': .*use 'xla'"),
    ],
)
def test_what_cannot_be_trained_leaves_no_workdir(fields, error, words, make_config, tmp_path):
    np.savez(tmp_path / "unlabelled.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    fields = {k: f"npz:{tmp_path}/unlabelled.npz" if v == "UNLABELLED" else v for k, v in fields.items()}
    with pytest.raises(error, match=words):
        train.train(make_config(fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# What goes wrong on the way


def test_a_run_that_diverges_stops_after_20_skipped_steps_with_its_last_good_state(stub, make_config, tmp_path):
    # The first update is finite and enormous; every loss after it is not finite.
    config = make_config({"optimizer.learning_rate": 1e30, "train.num_steps": 60, "train.sample_every": 60})
    with pytest.raises(RunError, match=r"20 steps.*learning_rate"):
        train.train(config, str(tmp_path / "run"))
    lines = metrics_of(tmp_path / "run")
    first_bad = next(line["step"] for line in lines if line["skipped_steps"])
    step = checkpoints_of(tmp_path / "run")[-1]
    assert 20 <= step - first_bad + 1 <= 21  # the loop learns of a step when the next one is dispatched
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        state = manager.restore(step)["state"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state["params"], state["ema_params"])))
    assert int(state["skipped_steps"]) == step - first_bad + 1
    assert int(state["step"]) == step


def test_19_skipped_steps_in_a_row_are_forgiven(tmp_path):
    good = {name: np.float32(1) for name in ("loss", "grad_norm", "learning_rate")}
    good |= {"loss_sums": np.ones(4), "loss_counts": np.ones(4), "skipped": 0, "skipped_steps": 0}
    with (
        training.MetricsWriter(tmp_path, 0) as writer,
        training.Log(writer, first_step=0, num_steps=100, log_every=7, batch_size=4) as log,
    ):
        worst = 0
        for step in range(1, 62):
            log.add(step, good | {"skipped": int(step % 20 != 0)})
            worst = max(worst, log.skipped_in_a_row)
        assert worst == 19
        for step in range(62, 83):
            log.add(step, good | {"skipped": 1})
        assert log.skipped_in_a_row >= train.MAX_SKIPPED_IN_A_ROW


# Where the images lie, and on how many devices the step runs


def test_placement_on_the_device_trains_on_the_same_batches(stub, make_config, tmp_path):
    fields = {"train.num_steps": 6, "train.sample_every": 6}
    losses = {}
    for placement in ("host", "device"):
        train.train(make_config(fields | {"data.placement": placement}), str(tmp_path / placement))
        losses[placement] = [line["loss"] for line in metrics_of(tmp_path / placement)]
    assert len(set(losses["host"])) == 6
    np.testing.assert_allclose(losses["device"], losses["host"], rtol=1e-6)


def test_a_stream_stopped_and_continued_equals_the_host_in_one_go_bit_for_bit(
    stub, make_config, npz_path, tmp_path, monkeypatch
):
    with np.load(npz_path) as archive:
        for i, (pixels, label) in enumerate(zip(archive["images"], archive["labels"], strict=True)):
            (tmp_path / "images" / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(tmp_path / "images" / str(label) / f"{i:02}.png")
    fields = {"data.source": f"folder:{tmp_path / 'images'}", "train.num_steps": 9, "train.sample_every": 9}
    once = train.train(make_config(fields), str(tmp_path / "once"))
    streamed, workdir = make_config(fields | {"data.placement": "stream"}), str(tmp_path / "run")
    with monkeypatch.context() as patch:
        send_at(patch, 6, signal.SIGTERM)
        with pytest.raises(training.Stopped):
            train.train(streamed, workdir)
    assert checkpoints_of(workdir) == [5, 6]
    state = train.train(streamed, workdir)
    assert_same_state(jax.device_get(state), jax.device_get(once))
    assert untimed(metrics_of(workdir)) == untimed(metrics_of(tmp_path / "once"))
    with pytest.raises(ConfigError, match=r"config\.model\.num_classes=2: .* from 0 to 2; use 3"):
        train.train(make_config(fields | {"data.placement": "stream", "model.num_classes": 2}), str(tmp_path / "few"))
    assert not (tmp_path / "few").exists()


def test_accumulation_changes_nothing_but_rounding(stub, make_config, tmp_path):
    # Without dropout, whose mask is drawn for a micro-batch.
    fields = {"train.num_steps": 4, "model.dropout": 0.0}
    losses = []
    for accumulate in (1, 4):
        workdir = tmp_path / str(accumulate)
        train.train(make_config(fields | {"train.accumulate": accumulate}), str(workdir))
        losses.append([line["loss"] for line in metrics_of(workdir)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_seed_and_nothing_else_decides(stub, make_config, tmp_path):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(make_config({"seed": seed, "train.num_steps": 3}), str(tmp_path / name))
        losses.append([line["loss"] for line in metrics_of(tmp_path / name)])
    assert losses[0] == losses[1]
    assert not set(losses[0]) & set(losses[2])


def test_log_every_averages_all_steps_of_its_interval(stub, make_config, tmp_path):
    train.train(make_config(), str(tmp_path / "each"))
    train.train(make_config({"train.log_every": 5}), str(tmp_path / "fifth"))
    each = [line["loss"] for line in metrics_of(tmp_path / "each")]
    lines = metrics_of(tmp_path / "fifth")
    assert [line["step"] for line in lines] == [5, 10, 12]
    means = [np.mean(each[:5]), np.mean(each[5:10]), np.mean(each[10:])]
    np.testing.assert_allclose([line["loss"] for line in lines], means, rtol=1e-6)


def test_some_steps_are_profiled_counted_from_where_the_program_starts(stub, make_config, tmp_path):
    fields = {"train.num_steps": 3, "train.checkpoint_every": 3, "train.sample_every": 100}
    train.train(make_config(fields), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "profile").exists()
    fields |= {"train.num_steps": 8, "train.profile_start": 1, "train.profile_steps": 2}
    train.train(make_config(fields), str(tmp_path / "run"))
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    events = [
        dict(event.stats)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted({event["step_num"] for event in events}) == [5, 6]


def test_compiled_programs_are_kept_where_the_config_says(stub, make_config, compilation_cache, tmp_path):
    fields = {"train.num_steps": 1, "train.sample_every": 100, "train.compilation_cache_dir": str(tmp_path / "cache")}
    try:
        train.train(make_config(fields), str(tmp_path / "run"))
    finally:
        experiment.use_compilation_cache(make_config({"train.compilation_cache_dir": compilation_cache}))
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("jit_train_step-")]


# From the command line


@pytest.fixture(scope="module")
def dry_run(run_program, make_config, write_config_file, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("dry")
    config = make_config({"data.source": "tfds:no_such_set", "data.data_dir": "/absent"})
    path = write_config_file(cwd / "tiny.py", config)
    return run_program("ddpm_jax.train", {"": [f"--config={path}", "--dry_run"]}, cwd)[""], cwd, config


def test_a_dry_run_needs_no_data_and_creates_nothing(dry_run):
    result, cwd, config = dry_run
    assert result.code == 0, result.stderr
    assert [path.name for path in cwd.iterdir() if path.name != "__pycache__"] == ["tiny.py"]
    values, _ = json.JSONDecoder().raw_decode(result.stdout)
    assert config_lib.from_dict(values) == config


def test_the_cores_of_a_cpu_are_devices(dry_run, run_program, tmp_path, write_config_file):
    path = write_config_file(tmp_path / "cores.py", dry_run[2])  # batches of 8
    said = run_program("ddpm_jax.train", {"": [f"--config={path}", "--dry_run"]}, tmp_path, XLA_FLAGS="")[""]
    number = max(n for n in (1, 2, 4, 8) if n <= compiler.num_cores())
    assert f"mesh: {{'data': {number}, 'fsdp': 1}} of {number} cpu device(s)" in said.stdout


def test_a_dry_run_counts_parameters_and_memory(dry_run, trained):
    output = dry_run[0].stdout
    table = dict(line.split() for line in output.split("\nparameters\n")[1].split("\n\n")[0].splitlines())
    total = sum(x.size for x in jax.tree.leaves(trained.state.params))
    assert int(table.pop("total").replace(",", "")) == total
    assert set(table) == set(trained.state.params)
    assert sum(int(size.replace(",", "")) for size in table.values()) == total
    assert "mesh: {'data': 1, 'fsdp': 1}" in output
    sizes = [float(line.split()[-2]) for line in output.splitlines() if line.startswith("memory a device")]
    state, _, peak = sizes
    assert state == pytest.approx(sum(x.nbytes for x in jax.tree.leaves(trained.state)) / 2**20, abs=0.1)
    assert peak >= state


def launch(args: list, cwd: Path, env: dict) -> subprocess.Popen:
    command = [sys.executable, "-m", "ddpm_jax.train", *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, env=env, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


@pytest.mark.slow
def test_sigkill_and_sigterm_then_the_same_command_equal_one_go(make_config, write_config_file, program_env, tmp_path):
    fields = {"train.num_steps": 80, "train.checkpoint_every": 10, "train.sample_every": 80}
    config = write_config_file(tmp_path / "tiny.py", make_config(fields))
    for name in ("straight", "killed"):
        process = launch([f"--config={config}", f"--workdir={tmp_path / name}"], tmp_path, program_env)
        if name == "killed":
            wait_for(tmp_path / "killed" / "checkpoints" / "20", process)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert checkpoints_of(tmp_path / "killed")[-1] < 80
            process = launch([f"--config={config}", f"--workdir={tmp_path / name}"], tmp_path, program_env)
            wait_for(tmp_path / "killed" / "checkpoints" / "50", process)
            process.terminate()
            assert process.wait() == 75
            process = launch([f"--config={config}", f"--workdir={tmp_path / name}"], tmp_path, program_env)
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
        assert "step_00000080.png" in errors  # it tells where the pictures lie
    states = []
    for name in ("straight", "killed"):
        with ocp.CheckpointManager(tmp_path / name / "checkpoints") as manager:
            states.append(manager.restore(80)["state"])
    assert_same_state(*states)
    assert untimed(metrics_of(tmp_path / "straight")) == untimed(metrics_of(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"mesh.fsdp": 2}], ids=str)
def test_four_devices_train_as_one(fields, trained, make_config, write_config_file, program_env, tmp_path):
    config = write_config_file(tmp_path / "tiny.py", make_config({"train.num_steps": 4} | fields))
    env = program_env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    process = launch([f"--config={config}", f"--workdir={tmp_path / 'four'}"], tmp_path, env)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    one, four = ([line["loss"] for line in metrics_of(x)] for x in (trained.workdir, tmp_path / "four"))
    np.testing.assert_allclose(four, one[:4], rtol=1e-5)
    run = experiment.load(str(tmp_path / "four"))  # and what four devices saved, one restores
    assert jax.tree.map(np.shape, run.params) == jax.tree.map(np.shape, trained.state.params)
