"""The train step and what surrounds it: state, optimizer, mesh, checkpoints, metrics."""

from ddpm_jax.training.checkpoint import open_checkpoints, restore, restore_latest, save
from ddpm_jax.training.gradient import Batch, LossFn, Metrics, accumulated_gradient, whole_gradient
from ddpm_jax.training.log import Log
from ddpm_jax.training.mesh import batch_sharding, make_mesh, replicated
from ddpm_jax.training.metrics import MetricsWriter, summarize
from ddpm_jax.training.optimizer import LearningRate, make_learning_rate, make_optimizer
from ddpm_jax.training.profile import Profile
from ddpm_jax.training.state import Params, TrainState, abstract_state, init_state, new_state
from ddpm_jax.training.step import make_train_step, step_memory, train_step
from ddpm_jax.training.stop import Stop, Stopped, stop_signal

__all__ = [
    "Batch",
    "LearningRate",
    "Log",
    "LossFn",
    "Metrics",
    "MetricsWriter",
    "Params",
    "Profile",
    "Stop",
    "Stopped",
    "TrainState",
    "abstract_state",
    "accumulated_gradient",
    "batch_sharding",
    "init_state",
    "make_learning_rate",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "new_state",
    "open_checkpoints",
    "replicated",
    "restore",
    "restore_latest",
    "save",
    "step_memory",
    "stop_signal",
    "summarize",
    "train_step",
    "whole_gradient",
]
