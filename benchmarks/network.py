"""What the benchmarks measure: a config from flags, the real jitted train step of it, and a batch on the device."""

import argparse
import runpy
from typing import Any

import jax
import numpy as np

from ddpm_jax import data, experiment, train, training
from ddpm_jax.compiler import use_cores
from ddpm_jax.config import Config, DataConfig, ModelConfig, TrainConfig, validate


def add_flags(
    parser: argparse.ArgumentParser, *, base: int, size: int, batch: int, mults: tuple[int, ...], attention_at: int = 16
) -> None:
    """--batch, --size, --base, --mults, --attention_at, --dropout, --dtype …, with the defaults given."""
    parser.add_argument("--batch", type=int, default=batch, help="images in a batch (%(default)s)")
    parser.add_argument("--size", type=int, default=size, help="height and width of an image (%(default)s)")
    parser.add_argument("--base", type=int, default=base, help="channels of the first level (%(default)s)")
    parser.add_argument(
        "--mults", type=int, nargs="+", default=mults, help="channel factor of each level (%(default)s)"
    )
    parser.add_argument(
        "--attention_at", type=int, default=attention_at, help="height of the level with attention (%(default)s)"
    )
    parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"), help="its implementation (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="(%(default)s)")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    parser.add_argument("--dtype", default=dtype, choices=("float32", "bfloat16"), help="(%(default)s here)")


def make_config(args: argparse.Namespace) -> Config:
    """The config that ``add_flags`` describes: the U-Net of Ho et al. with two blocks a level, on colour images."""
    config = Config(
        dtype=args.dtype,
        data=DataConfig(image_size=args.size, channels=3),
        model=ModelConfig(
            base_channels=args.base,
            channel_mults=tuple(args.mults),
            num_res_blocks=2,
            attention_resolutions=(args.attention_at,),
            attention=args.attention,
            dropout=args.dropout,
        ),
        train=TrainConfig(batch_size=args.batch),
    )
    validate(config)
    return config


def load_config(path: str) -> Config:
    """The config of a file such as configs/digits.py; the cores of a CPU are devices, as in the program."""
    config = runpy.run_path(path)["get_config"]()
    validate(config)
    use_cores(config.train.batch_size // config.train.accumulate, even=True)
    return config


class Trainer:
    """The train step as the program compiles it, a state, and one random batch that stays on the device."""

    def __init__(self, config: Config):
        """Initialises the state; compiles nothing but that."""
        mesh = experiment.make_mesh(config)
        self.setup = train.Setup(config, mesh)
        self.state = training.init_state(self.setup.init_fn, self.setup.optimizer, mesh, self.setup.key)
        shapes = self.setup.abstract_batch(num_images=1024)
        self.batch = {name: jax.device_put(_random(name, x, config), x.sharding) for name, x in shapes.items()}

    @property
    def num_parameters(self) -> int:
        """Of the network."""
        return sum(x.size for x in jax.tree.leaves(self.state.params))

    def step(self) -> Any:
        """Dispatches one optimizer step; returns its metrics without waiting for them."""
        self.state, metrics = self.setup.train_step(self.state, self.batch, self.setup.key)
        return metrics

    def steps(self, count: int) -> Any:
        """``count`` steps, dispatched as fast as the backend takes them; the metrics of the last."""
        return [self.step() for _ in range(count)][-1]


def random_images(count: int, size: int, channels: int = 3) -> data.ImageSet:
    """uint8 noise [N S S C] without labels."""
    return data.ImageSet(np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8), None)


def _random(name: str, x: jax.ShapeDtypeStruct, config: Config) -> np.ndarray:
    high = {"image": 256, "images": 256, "index": 1024, "flip": 2}.get(name, max(1, config.model.num_classes))
    return np.random.default_rng(0).integers(0, high, x.shape).astype(x.dtype)
