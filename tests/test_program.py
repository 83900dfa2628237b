"""Flags in, one clear line out."""

import json

import pytest

from ddpm_jax import program
from ddpm_jax.config import ConfigError


@pytest.fixture(scope="module")
def results(run_program, tmp_path_factory, make_config, write_config_file):
    """``python -m ddpm_jax.train`` with a mistake each, in a folder of its own; and that folder."""
    cwd = tmp_path_factory.mktemp("cwd")
    good = write_config_file(cwd / "good.py", make_config())
    (cwd / "empty.py").write_text("")
    (cwd / "torn.py").write_text("def get_config(:\n")
    (cwd / "elsewhere.py").write_text("import no_such_module\n")
    (cwd / "a_file").write_text("not a workdir")
    before = sorted(path.name for path in cwd.iterdir())
    lines = {
        "no config": [],
        "missing file": ["--config=absent.py"],
        "no get_config": ["--config=empty.py"],
        "syntax error": ["--config=torn.py"],
        "import error": ["--config=elsewhere.py"],
        "misspelt field": [f"--config={good}", "--config.train.bach_size=4"],
        "misspelt field, value apart": [f"--config={good}", "--config.train.bach_size", "4"],
        "misspelt negation": [f"--config={good}", "--noconfig.data.random_flop"],
        "section": [f"--config={good}", "--config.train=4"],
        "no int": [f"--config={good}", "--config.train.batch_size=many"],
        "no tuple": [f"--config={good}", "--config.model.channel_mults=wide"],
        "no bool": [f"--config={good}", "--config.data.random_flip=perhaps"],
        "bad choice": [f"--config={good}", "--config.diffusion.loss=mse"],
        "bad range": [f"--config={good}", "--config.optimizer.ema_decay=1.0"],
        "unknown flag": [f"--config={good}", "--wrokdir=x"],
        "stray argument": [f"--config={good}", "runs/x"],
        "no such source": [f"--config={good}", "--config.data.source=npz:absent.npz", "--workdir=w"],
        "unknown source": [f"--config={good}", "--config.data.source=imagenet", "--workdir=w"],
        "too few devices": [f"--config={good}", "--config.mesh.data=64", "--workdir=w"],
        "workdir is a file": [f"--config={good}", "--workdir=a_file"],
        "workdir in a file": [f"--config={good}", "--workdir=a_file/run"],
        "overrides": [
            f"--config={good}",
            "--config.model.channel_mults=(1,3)",
            "--config.model.attention_resolutions=(4,)",
            "--config.data.data_dir=/there",
            "--config.sampling.clip_x0=false",
            "--noconfig.data.random_flip",
            "--config.train.batch_size",
            "6",
            "--dry_run",
        ],
    }
    results = run_program("ddpm_jax.train", lines, cwd)
    return results, before, sorted(path.name for path in cwd.iterdir())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no config", ["--config", "configs/digits.py"]),
        ("missing file", ["absent.py", "no such file"]),
        ("no get_config", ["get_config"]),
        ("syntax error", ["torn.py"]),
        ("import error", ["no_such_module"]),
        ("misspelt field", ["--config.train.bach_size", "--config.train.batch_size"]),
        ("misspelt field, value apart", ["--config.train.bach_size", "--config.train.batch_size"]),
        ("misspelt negation", ["config.data.random_flop", "config.data.random_flip"]),
        ("section", ["--config.train"]),
        ("no int", ["config.train.batch_size", "many"]),
        ("no tuple", ["config.model.channel_mults", "wide"]),
        ("no bool", ["config.data.random_flip", "perhaps"]),
        ("bad choice", ["config.diffusion.loss='mse'", "l1, l2, huber"]),
        ("bad range", ["config.optimizer.ema_decay=1.0", "[0, 1)"]),
        ("unknown flag", ["wrokdir"]),
        ("stray argument", ["runs/x"]),
        ("no such source", ["data.source='npz:absent.npz'"]),
        ("unknown source", ["data.source='imagenet'", "npz:<path>"]),
        ("too few devices", ["config.mesh.data=64", "64 devices"]),
        ("workdir is a file", ["a_file"]),
        ("workdir in a file", ["a_file"]),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_it(results, name, parts):
    result = results[0][name]
    assert result.code in (1, 2), result
    assert [part for part in parts if part not in result.error] == [], result.error


def test_no_mistake_leaves_anything_behind(results):
    _, before, after = results
    assert [name for name in after if name not in (*before, "__pycache__")] == []


def test_overrides_of_every_type_arrive(results):
    result = results[0]["overrides"]
    assert result.code == 0, result.stderr
    values, _ = json.JSONDecoder().raw_decode(result.stdout)
    assert values["model"]["channel_mults"] == [1, 3]
    assert values["model"]["attention_resolutions"] == [4]
    assert values["data"]["data_dir"] == "/there"
    assert values["sampling"]["clip_x0"] is False
    assert values["data"]["random_flip"] is False
    assert values["train"]["batch_size"] == 6
    assert values["train"]["num_steps"] == 12


def test_a_bug_is_not_hidden():
    # A ValueError that is none of ours is a bug in the program, and wants its traceback.
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        program._guarded(main)


def test_exit_codes(capsys):
    def interrupted():
        raise KeyboardInterrupt

    def refused():
        raise ConfigError("config.seed=-1: must not be negative")

    assert program._guarded(interrupted) == 130
    assert program._guarded(refused) == 1
    assert capsys.readouterr().err == "error: config.seed=-1: must not be negative\n"
    assert program._guarded(lambda: None) is None
