"""What the tests of the programs share: a tiny data set, a tiny config, one trained run, and programs in processes."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)

jax.config.update("jax_num_cpu_devices", 1)  # on any machine, unless a test asks for more

ROOT = Path(__file__).parents[1]
NUM_IMAGES, NUM_CLASSES = 20, 3


@pytest.fixture(scope="session")
def npz_path(tmp_path_factory):
    """20 random 8x8 gray images of 3 classes."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8, 1), np.uint8)
    np.savez(path, images=pixels, labels=np.arange(NUM_IMAGES) % NUM_CLASSES)
    return path


@pytest.fixture(scope="session")
def make_config(npz_path) -> Callable[..., Config]:
    """``make_config({"train.num_steps": 4})``: a class-conditional U-Net of 8 channels, T = 50."""

    def make(overrides: dict[str, Any] | None = None) -> Config:
        config = Config(
            data=DataConfig(source=f"npz:{npz_path}", image_size=8, channels=1, random_flip=True),
            model=ModelConfig(
                base_channels=8,
                channel_mults=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(),
                dropout=0.1,
                num_classes=NUM_CLASSES,
                label_dropout=0.2,
            ),
            # v and a high rate, so that after twelve steps pictures are neither black and white nor all alike.
            diffusion=DiffusionConfig(schedule="cosine", num_timesteps=50, prediction="v"),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            train=TrainConfig(
                batch_size=8, num_steps=12, log_every=1, checkpoint_every=5, sample_every=7, num_samples=4
            ),
            sampling=SamplingConfig(num_steps=5, spacing="trailing"),
        )
        for field, value in (overrides or {}).items():
            section, _, name = field.rpartition(".")
            setattr(config_lib.get(config, section) if section else config, name, value)
        return config

    return make


@pytest.fixture(scope="session")
def write_config_file():
    """A config file, such as ``--config`` takes, that returns a given config."""

    def write(path: Path, config: Config) -> Path:
        text = json.dumps(config_lib.to_dict(config))
        path.write_text(
            "import json\nfrom ddpm_jax.config import from_dict\n\n\n"
            f"def get_config():\n    return from_dict(json.loads({text!r}))\n"
        )
        return path

    return write


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """A U-Net takes seconds to compile: here once a session and half as long, for this process and its children."""
    folder = str(tmp_path_factory.mktemp("jax_cache"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def quick_compilation():
    """Where XLA's optimizer takes the time, on programs that run once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def program_env(compilation_cache):
    """The environment of a program on one CPU device."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compilation_cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }


class Result(NamedTuple):
    """How a program ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """Its one line of error; nothing else may be there."""
        lines = self.stderr.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.stderr
        assert "Traceback" not in self.stderr
        return lines[-1]


# Imports once and forks for each command line, so that a dozen of them cost one import of JAX.
_DRIVER = """
import importlib, json, os, runpy, sys, traceback
name, command_lines = json.load(sys.stdin)
importlib.import_module(name)
del sys.modules[name]
for number, arguments in enumerate(command_lines):
    child = os.fork()
    if child == 0:
        for stream, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{os.environ['RESULTS']}/{number}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv, code = [name, *arguments], 99
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(f"{os.environ['RESULTS']}/{number}.code", "w").write(str(code))
"""


@pytest.fixture(scope="session")
def run_program(program_env, tmp_path_factory):
    """``run_program("ddpm_jax.sample", {"name": [flags]}, cwd) -> {"name": Result}``, in that order."""

    def run(module: str, command_lines: dict[str, list[str]], cwd: Path, **env: str) -> dict[str, Result]:
        results = tmp_path_factory.mktemp("results")
        subprocess.run(
            [sys.executable, "-c", _DRIVER],
            input=json.dumps([module, [list(map(str, line)) for line in command_lines.values()]]),
            text=True,
            check=True,
            cwd=cwd,
            env=program_env | env | {"RESULTS": str(results)},
        )
        return {
            name: Result(
                int((results / f"{number}.code").read_text()),
                (results / f"{number}.out").read_text(),
                (results / f"{number}.err").read_text(),
            )
            for number, name in enumerate(command_lines)
        }

    return run


@dataclasses.dataclass
class Trained:
    """A finished run of twelve steps."""

    config: Config
    workdir: Path
    state: Any  # training.TrainState on the host
    num_compilations: int  # of its train step

    def copy_to(self, path: Path) -> str:
        """Another workdir with the same run, to be spoilt."""
        import shutil

        shutil.copytree(self.workdir, path)
        return str(path)


@pytest.fixture(scope="session")
def trained(make_config, compilation_cache, tmp_path_factory) -> Trained:
    """The twelve steps of ``make_config()`` in one go; do not write to its workdir."""
    from ddpm_jax import train, training

    steps = []
    make_train_step = training.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "make_train_step", lambda *args, **kw: steps.append(make_train_step(*args, **kw)) or steps[0]
        )
        workdir = tmp_path_factory.mktemp("runs") / "straight"
        state = train.train(make_config(), str(workdir))
    assert len(steps) == 1
    return Trained(make_config(), workdir, jax.device_get(state), steps[0]._cache_size())
