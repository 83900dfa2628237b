"""The configuration of an experiment: typed dataclasses, their JSON, and what makes one invalid.

``configs/<name>.py`` returns a ``Config`` from ``get_config()``; ``--config.<field>=…`` overrides any field.
"""

import dataclasses
import warnings
from typing import Any

from ddpm_jax import diffusion, normalizer
from ddpm_jax.fields import brief, flat, get, names_of, nearest, type_error
from ddpm_jax.limits import CHOICES, NOT_NEGATIVE, POSITIVE, SHARES


class ConfigError(ValueError):
    """A field has a value that cannot work; the message is one line with the field, the value and the remedy."""


@dataclasses.dataclass(slots=True)
class DataConfig:
    """Where the images come from."""

    source: str = "sklearn:digits"  # tfds:<name>, folder:<path>, npz:<path> or sklearn:digits
    split: str = "train"  # of a TFDS data set, such as train+validation+test
    data_dir: str | None = None  # of TFDS; None is TFDS_DATA_DIR or ~/tensorflow_datasets
    image_size: int = 32  # height and width after a centre crop
    channels: int = 3  # 1 or 3
    random_flip: bool = False  # left to right, half of the images
    normalizer: str = "none"  # or mean_std: x0 = (x - mean) / std of images x in [-1, 1], channel by channel
    mean: tuple[float, ...] = ()  # of mean_std, and so is std; left out, a new run measures them in its images
    std: tuple[float, ...] = ()
    placement: str = "host"  # all images lie in host memory, with device in accelerator memory, with stream nowhere
    shuffle_buffer: int = 10_000  # images shuffled together in a stream of TFDS; a folder is always shuffled whole


@dataclasses.dataclass(slots=True)
class ModelConfig:
    """The network; see its class in ``models``. A setting that it does not have stays at its default."""

    kind: str = "unet"  # unet, linear_attention_unet or residual_unet
    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    up_attention_resolutions: tuple[int, ...] | None = None  # where they differ on the way up
    middle_attention: bool = True
    middle_attention_groups: int | None = None  # None: num_groups; 0: no norm
    attention_head_channels: int | None = None  # None: one head
    attention: str = "xla"  # or cudnn
    num_groups: int | None = None  # of the group norms; None: 32, or fewer where base_channels < 128
    norm_epsilon: float = 1e-6
    time_scale_shift: bool = False
    downsample_padding: int = 0  # 0: bottom and right, 1: all sides
    flip_sin_to_cos: bool = False
    freq_shift: float = 1.0
    block: str | None = None  # of linear_attention_unet: convnext or resnet; None is convnext
    num_heads: int | None = None  # of linear_attention_unet, each 32 wide; None is 4
    dropout: float = 0.0
    num_classes: int = 0  # 0: no labels
    null_label: bool = True  # whether label num_classes stands for "no label"
    label_dropout: float = 0.0  # share of examples trained without their label, for guidance


@dataclasses.dataclass(slots=True)
class DiffusionConfig:
    """The forward process and the loss."""

    schedule: str = "linear"
    num_timesteps: int = 1000
    scale_betas: bool = True  # beta_start and beta_end belong to T = 1000: times 1000 / num_timesteps
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] = ()  # one a timestep, for the schedule "table"
    rescale_zero_snr: bool = False  # the chain ends in pure noise
    time: str = "discrete"  # or continuous: the loss draws noise levels between those of the T timesteps, too
    prediction: str = "eps"  # eps, x0 or v
    loss: str = "l2"  # l1, l2 or huber
    loss_weight: str = "uniform"  # uniform, min_snr or p2
    snr_gamma: float = 5.0  # of min_snr: the SNR above which all timesteps weigh the same
    learned_variance: bool = False  # twice the output channels; sampled with sampling.variance=learned


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
    """Adam (AdamW where weight_decay > 0) and the average of the parameters."""

    learning_rate: float = 2e-4
    lr_decay: str = "constant"  # or cosine, to 0 at train.num_steps
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip_norm: float = 1.0  # of the global gradient; 0 is off
    ema_decay: float = 0.9999
    ema_start: int = 0  # until this step the average is a copy of the parameters


@dataclasses.dataclass(slots=True)
class TrainConfig:
    """The length of a run, its rhythm, and how a step is computed."""

    batch_size: int = 128  # of one optimizer step, over all devices
    num_steps: int = 100_000
    log_every: int = 100
    checkpoint_every: int = 5_000
    sample_every: int = 5_000
    num_samples: int = 64  # images in a sample grid
    keep_last: int = 3  # checkpoints
    keep_every: int = 0  # also keep those of every n-th step; 0 is none
    accumulate: int = 1  # micro-batches a step
    remat: str = "none"  # none, blocks or dots: what the backward pass computes again to save memory
    compilation_cache_dir: str = ""  # where compiled programs are kept from one start to the next; "": nowhere
    profile_start: int = 0  # the step before which profiling begins, counted from the start of the program
    profile_steps: int = 0  # how many are profiled, into <workdir>/profile; 0 is none


@dataclasses.dataclass(slots=True)
class SamplingConfig:
    """Arguments of ``diffusion.sample``; the programs' flags override them."""

    method: str = "ddim"  # ddim, ddpm, dpm++ or heun
    num_steps: int = 50
    eta: float = 0.0
    spacing: str = "leading"
    steps_offset: int = 0  # of leading
    end: str = "clean"  # or first: ddim stops at the noise level of t = 0
    variance: str = "fixed_small"  # fixed_small, fixed_large or learned
    clip_x0: bool = True
    clip_range: float = 1.0  # clip to [-clip_range, clip_range]
    dynamic_threshold: float = 0.0  # clip at this quantile of |x0_hat| of each image and scale back; 0 is off
    max_threshold: float = 0.0  # cap of what that clips at, in units of the clip bounds; 0 is none
    rederive_eps: bool = True
    guidance: float = 1.0  # out = out_null + guidance (out_label - out_null)


@dataclasses.dataclass(slots=True)
class MeshConfig:
    """Devices: data * fsdp of them; -1 is all the rest."""

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(slots=True)
class Config:
    """One experiment."""

    seed: int = 0
    dtype: str = "auto"  # of convolutions and matrix products: float32, bfloat16, or auto: bfloat16 on accelerators
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def field_names() -> list[str]:
    """Dotted names of all fields, as in ``--config.<field>``."""
    return names_of(Config)


def nearest_field(name: str) -> str:
    """The field most like a misspelt one."""
    return nearest(name, field_names())


def validate(config: Config) -> None:
    """Raises ``ConfigError`` for the first field whose value cannot work, before anything is read or compiled."""
    if not isinstance(config, Config):
        # A file that ml_collections could not read is an object whose every attribute raises; let it.
        fields = getattr(config, "data", None)
        raise ConfigError(f"get_config() returned a {type(config).__name__} ({fields!r:.40}); return a ddpm_jax Config")
    for field in field_names():
        if problem := type_error(Config, field, get(config, field)):
            raise ConfigError(f"config.{field}={brief(get(config, field))}: {problem}")
    for field, choices in CHOICES.items():
        if get(config, field) not in choices:
            listed = ", ".join(map(str, choices))
            raise ConfigError(f"config.{field}={get(config, field)!r}: choose one of {listed}")
    for fields, fits, rule in (
        (POSITIVE, lambda x: x is None or x > 0, "must be positive"),
        (NOT_NEGATIVE, lambda x: x >= 0, "must not be negative"),
        (SHARES, lambda x: 0 <= x < 1, "must lie in [0, 1)"),
    ):
        for field in fields:
            if not fits(get(config, field)):
                raise ConfigError(f"config.{field}={get(config, field)!r}: {rule}")
    if config.mesh.data < 1 and config.mesh.data != -1:
        raise ConfigError(f"config.mesh.data={config.mesh.data}: must be positive, or -1 for all the rest")
    if config.seed >= 2**63:
        raise ConfigError(f"config.seed={config.seed}: must be below 2^63")
    _check_stream(config)
    _check_network(config)
    _check_chains(config)


def _check_stream(config: Config) -> None:
    settings = config.data
    if settings.placement != "stream":
        return
    if not settings.source.startswith(("tfds:", "folder:")):
        raise ConfigError(
            f"config.data.placement='stream': is of tfds: and folder:, not of config.data.source={settings.source!r}; "
            "use host"
        )
    if needs_measuring(config):
        raise ConfigError(
            "config.data.mean=(): the images of config.data.placement='stream' are not measured; set config.data.mean "
            "and config.data.std, such as those in the config.json of a run with placement host on a part of them"
        )


def _check_network(config: Config) -> None:
    model, size = config.model, config.data.image_size
    if not model.channel_mults or min(model.channel_mults) < 1:
        raise ConfigError(f"config.model.channel_mults={model.channel_mults}: needs one positive factor a level")
    levels = len(model.channel_mults)
    factor = 2 ** (levels - 1)
    if size % factor:
        raise ConfigError(
            f"config.data.image_size={size}: must be divisible by {factor}, since config.model.channel_mults="
            f"{model.channel_mults} halves the image {levels - 1} times"
        )
    heights = [size // 2**i for i in range(levels)]
    # Other networks have no such settings, and `experiment.make_model` refuses them unless they are the defaults.
    for field in ("attention_resolutions", "up_attention_resolutions") if model.kind == "unet" else ():
        for resolution in getattr(model, field) or ():
            if resolution not in heights:
                raise ConfigError(
                    f"config.model.{field}={getattr(model, field)}: no level has height {resolution}; "
                    f"the levels' heights are {', '.join(map(str, heights))}"
                )
    if model.base_channels < 4:
        raise ConfigError(f"config.model.base_channels={model.base_channels}: the time embedding needs at least 4")
    for field, optional in (("num_groups", 1), ("middle_attention_groups", 0), ("attention_head_channels", 1)):
        value = getattr(model, field)
        if value is not None and (value < optional or model.base_channels % (value or 1)):
            raise ConfigError(
                f"config.model.{field}={value}: must divide config.model.base_channels={model.base_channels}"
            )
    if model.label_dropout and not (model.num_classes and model.null_label):
        remedy = "set config.model.null_label" if model.num_classes else "set config.model.num_classes"
        raise ConfigError(f"config.model.label_dropout={model.label_dropout}: there is no label to drop; {remedy}")
    if config.sampling.guidance != 1 and not (model.num_classes and model.label_dropout):
        raise ConfigError(
            f"config.sampling.guidance={config.sampling.guidance}: needs a network trained with "
            "config.model.num_classes and config.model.label_dropout > 0; use 1"
        )


def _check_chains(config: Config) -> None:
    train, sampling = config.train, config.sampling
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"config.train.accumulate={train.accumulate}: must divide config.train.batch_size={train.batch_size}"
        )
    if sampling.eta and sampling.method != "ddim":
        raise ConfigError(f"config.sampling.eta={sampling.eta}: method {sampling.method!r} has no eta; use 0")
    if not 0 <= sampling.eta <= 1:
        raise ConfigError(f"config.sampling.eta={sampling.eta}: must lie in 0 .. 1")
    if sampling.end == "first" and sampling.method != "ddim":
        raise ConfigError(f"config.sampling.end='first': is of ddim, not of {sampling.method!r}; use clean")
    settings = config.diffusion
    if settings.snr_gamma != DiffusionConfig().snr_gamma and settings.loss_weight != "min_snr":
        raise ConfigError(
            f"config.diffusion.snr_gamma={settings.snr_gamma}: is of min_snr, not of config.diffusion.loss_weight="
            f"{settings.loss_weight!r}; leave it out"
        )
    try:
        betas = diffusion.schedule_betas(settings.schedule, **schedule_options(settings))
        t, _ = diffusion.timestep_plan(settings.num_timesteps, sampling.num_steps, **plan_options(sampling))
        diffusion.check_variance(sampling.variance, settings.learned_variance)
        diffusion.check_thresholds(sampling.clip_x0, sampling.dynamic_threshold or None, sampling.max_threshold or None)
        diffusion.check_time(settings.time, settings.schedule, settings.rescale_zero_snr, settings.learned_variance)
        normalizer.check(config.data.normalizer, config.data.mean, config.data.std, config.data.channels)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    if betas[-1] == 1:
        _check_zero_snr(config, int(t[0]))


def _check_zero_snr(config: Config, first_t: int) -> None:
    """Lin et al. 2023, sections 3.2 to 3.4: a chain that ends in pure noise needs another prediction than eps."""
    if config.diffusion.prediction == "eps":
        raise ConfigError(
            "config.diffusion.prediction='eps': the last timestep is pure noise (rescale_zero_snr, or a last beta of "
            "1), where eps says nothing of the image; use v or x0"
        )
    if first_t < config.diffusion.num_timesteps - 1:
        warnings.warn(
            f"config.sampling.spacing={config.sampling.spacing!r}: starts at t = {first_t}, but only the last timestep "
            "is the pure noise that x_T is; use trailing",
            diffusion.ScheduleWarning,
            stacklevel=4,
        )


def schedule_options(settings: DiffusionConfig) -> dict[str, Any]:
    """The keyword arguments of ``diffusion.make_schedule``."""
    names = ("num_timesteps", "scale_betas", "beta_start", "beta_end", "betas")
    return {name: getattr(settings, name) for name in names} | {"zero_snr": settings.rescale_zero_snr}


def plan_options(settings: SamplingConfig) -> dict[str, Any]:
    """The arguments of ``diffusion.timestep_plan`` after the two lengths."""
    return {"spacing": settings.spacing, "offset": settings.steps_offset, "end": settings.end}


def needs_measuring(config: Config) -> bool:
    """Whether the numbers of the normaliser are still to be taken from the images."""
    return config.data.normalizer == "mean_std" and not config.data.mean


def with_normalizer(config: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> Config:
    """A copy of the config with these numbers of its normaliser."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mean=mean, std=std))


def with_stand_in_normalizer(config: Config) -> Config:
    """A config whose train step can be compiled: numbers not yet measured are 0 and 1, which change no shape."""
    channels = config.data.channels
    return with_normalizer(config, (0.0,) * channels, (1.0,) * channels) if needs_measuring(config) else config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of ``to_dict``, also after JSON made lists of the tuples; a missing field takes its default.

    Raises:
        ConfigError: a field that does not exist, with the nearest one that does.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"the config is {type(values).__name__}, not an object with fields")
    config = Config()
    for field, value in flat(values).items():
        if field not in field_names():
            raise ConfigError(f"config.{field}: no such field; did you mean config.{nearest_field(field)}?")
        section, _, name = field.rpartition(".")
        owner = get(config, section) if section else config
        setattr(owner, name, tuple(value) if isinstance(value, list) else value)
    return config
