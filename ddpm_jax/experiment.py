"""Config -> network, schedule, denoiser, optimizer: the one place where the rooms meet."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jax.tree_util import Partial

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, images, models, training
from ddpm_jax import normalizer as normalizer_lib
from ddpm_jax.compiler import compiler_options
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.fields import differences

# Two runs that differ here do not have the same parameters, or do not mean the same by them.
IDENTITY_FIELDS = [
    field
    for field in config_lib.field_names()
    if field.startswith(("model.", "diffusion.")) and field not in ("model.attention", "model.dropout")
] + ["data.image_size", "data.channels", "data.normalizer", "data.mean", "data.std"]


class RunError(ValueError):
    """A workdir that cannot be used as asked; the message is one line with the path and the remedy."""


class Run(NamedTuple):
    """A trained run, ready to sample from: ``diffusion.sample(run.denoise_fn, run.schedule, x_T, key)``."""

    config: Config
    schedule: diffusion.Schedule
    denoise_fn: Partial  # denoise_fn(x_t, t[, label]) -> what config.diffusion.prediction says
    params: training.Params


def make_schedule(config: Config) -> diffusion.Schedule:
    """The noise schedule."""
    return diffusion.make_schedule(config.diffusion.schedule, **config_lib.schedule_options(config.diffusion))


def make_model(config: Config) -> models.Network:
    """The network of ``model.kind``, with those settings that its class declares as fields; None is left to it.

    Raises:
        ConfigError: no such network, one that is not told what ``diffusion.time`` draws, a setting that the network
            does not have and that is not at its default, or an attention implementation that cannot run here.
    """
    try:
        network: Any = models.network_class(config.model.kind, config.diffusion.time)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    accepted = {field.name for field in dataclasses.fields(network)}
    own = [x.name for x in dataclasses.fields(config.model) if x.name not in ("kind", "label_dropout")]
    settings = {f"model.{name}": name for name in own} | {"train.remat": "remat"}
    for field, name in settings.items():
        value = config_lib.get(config, field)
        if name not in accepted and value != config_lib.get(Config(), field):
            raise ConfigError(
                f"config.{field}={value!r}: the network {config.model.kind!r} has no such setting; leave it out"
            )
    if "attention" in accepted:
        _check_attention(config)
    values = {name: config_lib.get(config, field) for field, name in settings.items()}
    out_channels = config.data.channels * (2 if config.diffusion.learned_variance else 1)
    values |= {"out_channels": out_channels, "dtype": compute_dtype(config)}
    return network(**{name: x for name, x in values.items() if name in accepted and x is not None})


def _check_attention(config: Config) -> None:
    settings = config.model
    levels = list(enumerate(settings.channel_mults))
    heights = {*settings.attention_resolutions, *(settings.up_attention_resolutions or ())}
    attending = [m for i, m in levels if config.data.image_size // 2**i in heights]
    attending += settings.channel_mults[-1:] if settings.middle_attention else ()
    widths = [settings.attention_head_channels or settings.base_channels * mult for mult in attending]
    try:
        models.check_attention(settings.attention, widths, compute_dtype(config), jax.devices()[0])
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None


def compute_dtype(config: Config) -> jnp.dtype:
    """What ``config.dtype`` means here; a CPU has no fast bfloat16."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.dtype == "auto" else config.dtype)


def make_init_fn(config: Config, model: models.Network) -> Callable[[jax.Array], training.Params]:
    """``init_fn(key) -> params``."""

    def init_fn(key: jax.Array) -> training.Params:
        x_t = jnp.zeros((1, *image_shape(config)))
        time = jnp.zeros((1,), jnp.float32 if models.takes_noise_level(model) else jnp.int32)
        return model.init(key, x_t, time)["params"]

    return init_fn


def make_denoise_fn(model: models.Network, params: training.Params, schedule: diffusion.Schedule) -> Partial:
    """``denoise_fn(x_t, t, label=None)``, the network with its parameters; no label is the null label."""
    return Partial(_Apply(model), params, schedule)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """``model.apply`` without its dictionary: hashable by value, so that equal networks share compiled samplers."""

    model: models.Network

    def __call__(
        self,
        params: training.Params,
        schedule: diffusion.Schedule,
        x_t: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
    ) -> jax.Array:
        time = network_time(self.model, schedule, t)
        return self.model.apply({"params": params}, x_t, time, label)  # type: ignore[return-value]


def network_time(model: models.Network, schedule: diffusion.Schedule, t: jax.Array) -> jax.Array:
    """What the network is told in place of t, int32 [B]: t itself, or the noise level 1 - alpha_bar, float32 [B]."""
    return diffusion.rates(schedule, t, t).noise_level if models.takes_noise_level(model) else t


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, training.LearningRate]:
    """The optimizer and its learning rate."""
    settings = config.optimizer
    learning_rate = training.make_learning_rate(
        settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay=settings.lr_decay,
        num_steps=config.train.num_steps,
    )
    optimizer = training.make_optimizer(
        learning_rate, weight_decay=settings.weight_decay, grad_clip_norm=settings.grad_clip_norm
    )
    return optimizer, learning_rate


def use_compilation_cache(config: Config) -> None:
    """Keeps the programs that this process compiles from now on in ``train.compilation_cache_dir``, if it says any."""
    if config.train.compilation_cache_dir:
        compilation_cache.set_cache_dir(config.train.compilation_cache_dir)
        compilation_cache.reset_cache()  # or a process that has compiled already would go on without


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices of a training run, out of those given or of all there are."""
    try:
        mesh = training.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    if config.train.batch_size % (mesh.size * config.train.accumulate):
        raise ConfigError(
            f"config.train.batch_size={config.train.batch_size}: must be divisible by the {mesh.size} devices times "
            f"config.train.accumulate={config.train.accumulate}"
        )
    return mesh


def image_shape(config: Config) -> tuple[int, int, int]:
    """[H W C] of one image."""
    return (config.data.image_size, config.data.image_size, config.data.channels)


def make_normalizer(config: Config) -> normalizer_lib.Normalizer:
    """What is between uint8 images and x0. Raises ConfigError where its numbers have not been measured yet."""
    if config_lib.needs_measuring(config):
        raise ConfigError("config.data.mean=(): data.normalizer='mean_std' needs it, and std; train to measure them")
    if config.data.normalizer == "none":
        return normalizer_lib.IDENTITY
    return normalizer_lib.Normalizer(tuple(config.data.mean), tuple(config.data.std))


def sampling_options(config: Config) -> dict[str, Any]:
    """The keyword arguments of ``diffusion.sample`` that a config decides."""
    settings = config.sampling
    bounds = normalizer_lib.clip_bounds(make_normalizer(config), settings.clip_range)
    return {
        "method": settings.method,
        "num_steps": settings.num_steps,
        "spacing": settings.spacing,
        "plan": _plan(config),
        "eta": settings.eta,
        "variance": settings.variance,
        "prediction": config.diffusion.prediction,
        "clip_x0": bounds if settings.clip_x0 else False,
        "dynamic_threshold": settings.dynamic_threshold or None,
        "max_threshold": settings.max_threshold or None,
        "rederive_eps": settings.rederive_eps,
        "compiler_options": compiler_options(jax.default_backend()),
    }


def _plan(config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    """The steps of a chain where num_steps and spacing alone do not say them."""
    settings = config.sampling
    if not settings.steps_offset and settings.end == "clean":
        return None
    T, options = config.diffusion.num_timesteps, config_lib.plan_options(settings)
    return diffusion.timestep_plan(T, settings.num_steps, **options)


def conditioned(denoise_fn: Partial, config: Config, label: jax.Array | None) -> Partial:
    """``denoise_fn(x_t, t)`` for images of the classes ``label``, int32 [B], guided as ``sampling.guidance`` says."""
    if label is None:
        return denoise_fn
    if config.sampling.guidance == 1:
        return Partial(_labelled, denoise_fn, label)
    null_label = config.model.num_classes
    return diffusion.guided(denoise_fn, label, null_label, config.sampling.guidance)


def _labelled(denoise_fn: Partial, label: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    return denoise_fn(x_t, t, label)


def load(workdir: str, weights: str = "ema", step: int | None = None) -> Run:
    """A run from its workdir, on one device or on all: parameters are replicated over the devices there are.

    Args:
        workdir: of a training run.
        weights: "ema" or "raw".
        step: of the checkpoint; None is the newest that can be read.

    Raises:
        RunError: no run, no such checkpoint, or none that can be read.
    """
    if weights not in ("ema", "raw"):
        raise RunError(f"weights={weights}: choose ema or raw")
    config = read_config(workdir)
    if config is None:
        raise RunError(f"{workdir}: holds no run (config.json is missing); train one with python -m ddpm_jax.train")
    try:
        model = make_model(config)
    except ConfigError:  # a run that was trained with cuDNN is read anywhere: XLA's attention is the same function
        config.model.attention = "xla"
        model = make_model(config)
    optimizer, _ = make_optimizer(config)
    mesh = training.make_mesh()
    abstract = training.abstract_state(make_init_fn(config, model), optimizer, mesh)
    with training.open_checkpoints(workdir, read_only=True) as checkpoints:
        steps = sorted(checkpoints.all_steps())
        if not steps or (step is not None and step not in steps):
            listed = f"its checkpoints are {', '.join(map(str, steps))}" if steps else "it has no checkpoint yet"
            raise RunError(f"{workdir}: no checkpoint{'' if step is None else f' of step {step}'}; {listed}")
        try:
            if step is None:
                state = training.restore_latest(checkpoints, abstract, move_damaged=False)
            else:
                state = training.restore(checkpoints, step, abstract)
        except ValueError as error:
            raise RunError(str(error)) from None
    assert state is not None  # there are steps to choose from
    params = state.ema_params if weights == "ema" else state.params
    schedule = make_schedule(config)
    return Run(config, schedule, make_denoise_fn(model, params, schedule), params)


def read_config(workdir: str) -> Config | None:
    """The config of the run in a workdir; None where there is none."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        config = config_lib.from_dict(json.loads(path.read_text()))
        config_lib.validate(config)
        return config
    except (ValueError, OSError) as error:  # no UTF-8, no JSON, no config, or nothing to read
        raise RunError(f"{path}: {error}; restore it from a copy, or use another workdir") from None


def check_workdir(workdir: str, config: Config) -> None:
    """Refuses a workdir that holds a run of another network or diffusion, naming the fields that differ.

    Other fields may change from one start to the next; what the data's order hangs on is named in a warning.
    """
    existing = _trained_config(workdir)
    if existing is None:
        return
    fields = ["seed", "train.batch_size", "data.source", "data.split"]
    streamed = {x.data.placement == "stream" and x.data.source.startswith("tfds:") for x in (existing, config)}
    fields += (True in streamed) * ["data.shuffle_buffer"] + (len(streamed) > 1) * ["data.placement"]
    if changed := differences(existing, config, fields):
        warnings.warn(f"{workdir} continues with other batches than it began with ({'; '.join(changed)})", stacklevel=2)
    if differing := differences(existing, config, IDENTITY_FIELDS):
        raise RunError(
            f"{workdir} holds a run of another model or diffusion ({'; '.join(differing)}); "
            "use another --workdir, or the same fields"
        )


def with_normalizer_of_run(workdir: str, config: Config) -> Config:
    """``config`` with the mean and std of the run in a workdir, where there is one and ``config`` leaves them out."""
    existing = _trained_config(workdir)
    if existing is None or not config_lib.needs_measuring(config) or config_lib.needs_measuring(existing):
        return config
    return config_lib.with_normalizer(config, existing.data.mean, existing.data.std)


def _trained_config(workdir: str) -> Config | None:
    """The config of the run in a workdir, where it has a checkpoint."""
    checkpoints = epath.Path(workdir) / "checkpoints"
    return read_config(workdir) if checkpoints.exists() and any(checkpoints.iterdir()) else None


def check_new_workdir(workdir: str) -> None:
    """Refuses a workdir that holds a run already."""
    path = epath.Path(workdir)
    if (path / "config.json").exists() or (path / "checkpoints").exists():
        raise RunError(f"{workdir}: holds a run already; choose another --workdir")


def write_run(workdir: str, config: Config, params: training.Params, ema_params: training.Params) -> None:
    """A run at step 0 that begins with these parameters and a fresh optimizer; all of it, or nothing is left behind."""
    check_new_workdir(workdir)
    optimizer, _ = make_optimizer(config)
    state = training.new_state(jax.tree.map(jnp.asarray, params), optimizer)
    state = state._replace(ema_params=jax.tree.map(jnp.asarray, ema_params))
    path = epath.Path(workdir)
    existed = path.exists()
    try:
        with training.open_checkpoints(workdir) as checkpoints:
            training.save(checkpoints, state)
        write_config(workdir, config)
    except BaseException:
        (path / "checkpoints" if existed else path).rmtree(missing_ok=True)
        raise


def write_config(workdir: str, config: Config) -> None:
    """Writes ``<workdir>/config.json``, on process 0."""
    if jax.process_index() == 0:
        text = json.dumps(config_lib.to_dict(config), indent=2)
        try:
            images.write_atomically(epath.Path(workdir) / "config.json", text.encode())
        except OSError as error:
            raise RunError(f"{workdir}: cannot be written ({error}); choose another --workdir") from None
