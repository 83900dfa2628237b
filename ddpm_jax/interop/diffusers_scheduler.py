"""The ``scheduler_config.json`` of diffusers' DDPMScheduler and DDIMScheduler, read and written without diffusers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ddpm_jax import diffusion

# What diffusers assumes where an older file lacks a key; both classes agree.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",  # DDPM reads it; files of DDIM may carry it along
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,  # DDIM reads it; files of DDPM may carry it along
    "rescale_betas_zero_snr": False,
}
# Keys that neither class reads: bookkeeping of diffusers, and what other schedulers left behind.
_HARMLESS = {
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "_use_default_values",
    "skip_prk_steps",
    "tensor_format",
}
_METHODS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
_PIPELINE_STEPS = {"ddpm": 1000, "ddim": 50}  # the defaults of DDPMPipeline and DDIMPipeline
_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_NO_CAP = 1e6  # of |x0_hat|, which no image comes near
_SPACINGS = ("leading", "trailing", "linspace")
# The _log forms are meant to be the same numbers; diffusers' own fixed_large_log takes the root of a logarithm, NaN.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned",
}


class Settings(NamedTuple):
    """What a scheduler file says, as fields of a config's ``diffusion`` and ``sampling``."""

    diffusion: dict[str, Any]
    sampling: dict[str, Any]


def schedule_settings(found: Mapping[str, Any]) -> Settings:
    """The noise schedule and the sampling defaults of a diffusers scheduler.

    A missing key takes diffusers' default. Betas are as diffusers builds them, never scaled by 1000 / T. DDIM there
    keeps the network's own eps beside a clipped x0, so rederive_eps is False. num_steps is that of DDPMPipeline, 1000,
    or DDIMPipeline, 50, or all timesteps where there are fewer. steps_offset counts with leading only, as there.

    Args:
        found: the object in ``scheduler_config.json``.

    Returns:
        (fields of ``diffusion``, fields of ``sampling``); a field left out keeps its default.

    Raises:
        ValueError: a scheduler, key or value that has no counterpart here; the message names it and the remedy.
    """
    method = _method(found)
    values = _checked_values(found)
    return Settings(_diffusion(values), _sampling(values, method))


def scheduler_config(settings: Mapping[str, Any], sampling: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """The way back: ``scheduler_config.json`` from a config's ``diffusion`` and ``sampling``.

    A schedule that the class does not know by name is written as trained_betas. num_steps, eta and rederive_eps
    (``use_clipped_model_output``) are arguments of the pipeline's call there and not in the file.

    Args:
        settings: all fields of ``diffusion``, such as ``dataclasses.asdict(config.diffusion)``.
        sampling: all fields of ``sampling``.
        class_name: "DDPMScheduler" or "DDIMScheduler".

    Raises:
        ValueError: a setting that diffusers does not have.
    """
    method = _method({"_class_name": class_name})
    spacing = sampling["spacing"]
    if spacing not in _SPACINGS:
        raise ValueError(f"sampling.spacing={spacing!r}: diffusers has none such; use one of {', '.join(_SPACINGS)}")
    values = {
        "_class_name": class_name,
        "num_train_timesteps": settings["num_timesteps"],
        **_beta_keys(settings, class_name),
        "rescale_betas_zero_snr": settings["rescale_zero_snr"],
        "prediction_type": _key_of(_PREDICTIONS, "diffusion.prediction", settings["prediction"]),
        "clip_sample": sampling["clip_x0"],
        "clip_sample_range": sampling["clip_range"],
        **_threshold_keys(sampling),
        "timestep_spacing": spacing,
        "steps_offset": sampling["steps_offset"],
    }
    if method == "ddpm":
        return values | {"variance_type": _key_of(_VARIANCES, "sampling.variance", sampling["variance"])}
    return values | {"set_alpha_to_one": sampling["end"] == "clean"}


def _method(values: Mapping[str, Any]) -> str:
    name = values.get("_class_name")
    if name not in _METHODS:
        raise ValueError(
            f"_class_name={name!r}: only {' and '.join(_METHODS)} have a counterpart; write one of these with "
            "diffusers, DDIMScheduler.from_config(scheduler.config).save_pretrained(...)"
        )
    return _METHODS[name]


def _checked_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a file with a value of the right type; those that it lacks take diffusers' defaults."""
    values = {key: value for key, value in found.items() if key not in _HARMLESS}
    if "predict_epsilon" in values:  # the older name of prediction_type
        values = {"prediction_type": "epsilon" if values.pop("predict_epsilon") else "sample"} | values
    for key, value in values.items():
        if key not in _DEFAULTS:
            raise ValueError(f"{key}={value!r:.60}: not a setting that is known here; remove it if it changes nothing")
        if not _fits(value, _DEFAULTS[key]):
            wanted = "null or a list of numbers" if key == "trained_betas" else f"a {type(_DEFAULTS[key]).__name__}"
            raise ValueError(f"{key}={value!r:.60}: must be {wanted}")
    return _DEFAULTS | values


def _fits(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or (isinstance(value, list | tuple) and all(type(x) in (int, float) for x in value))
    return type(value) is type(default) or (type(value) is int and type(default) is float)


def _chosen(choices: Mapping[str, str], values: Mapping[str, Any], key: str) -> str:
    if values[key] not in choices:
        raise ValueError(f"{key}={values[key]!r}: is not supported; only {', '.join(choices)}")
    return choices[values[key]]


def _diffusion(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``diffusion``."""
    betas = values["trained_betas"]
    if betas is not None and len(betas) != values["num_train_timesteps"]:
        raise ValueError(
            f"trained_betas: has {len(betas)} numbers for num_train_timesteps={values['num_train_timesteps']}; "
            "give one a timestep"
        )
    prediction = _chosen(_PREDICTIONS, values, "prediction_type")
    if values["rescale_betas_zero_snr"] and prediction == "eps":
        raise ValueError(
            "rescale_betas_zero_snr=True: with prediction_type='epsilon' the first step divides by zero, in diffusers "
            "too; set it to false, or prediction_type to what the network was trained for"
        )
    settings = {
        "schedule": "table" if betas is not None else _chosen(_SCHEDULES, values, "beta_schedule"),
        "num_timesteps": values["num_train_timesteps"],
        "scale_betas": False,
        "betas": tuple(map(float, betas or ())),
        "rescale_zero_snr": values["rescale_betas_zero_snr"],
        "prediction": prediction,
        "learned_variance": values["variance_type"] == "learned_range",
    }
    if settings["schedule"] in ("table", "cosine"):  # the beta range is not looked at
        return settings
    return settings | {"beta_start": float(values["beta_start"]), "beta_end": float(values["beta_end"])}


def _sampling(values: dict[str, Any], method: str) -> dict[str, Any]:
    """Fields of ``sampling``. Thresholding takes the place of clipping; with its default cap of 1 it is [-1, 1]."""
    spacing = _chosen(dict(zip(_SPACINGS, _SPACINGS, strict=True)), values, "timestep_spacing")
    thresholding = values["thresholding"]
    if thresholding and not values["sample_max_value"] >= 1:
        raise ValueError(
            f"sample_max_value={values['sample_max_value']}: below 1 thresholding would widen the range; use at least 1"
        )
    settings = {
        "method": method,
        "num_steps": min(_PIPELINE_STEPS[method], values["num_train_timesteps"]),
        "eta": 0.0,
        "spacing": spacing,
        "steps_offset": values["steps_offset"] if spacing == "leading" else 0,
        "end": "clean" if method == "ddpm" or values["set_alpha_to_one"] else "first",
        "variance": _chosen(_VARIANCES, values, "variance_type"),
        "clip_x0": values["clip_sample"] or thresholding,
        "clip_range": float(values["clip_sample_range"]) if values["clip_sample"] and not thresholding else 1.0,
        "rederive_eps": False,
    }
    if not thresholding or values["sample_max_value"] == 1:
        return settings
    return settings | {
        "dynamic_threshold": float(values["dynamic_thresholding_ratio"]),
        "max_threshold": float(values["sample_max_value"]),
    }


def _threshold_keys(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Dynamic thresholding; they cap it always, and at bounds of [-1, 1] only."""
    if not sampling.get("dynamic_threshold"):
        return {"thresholding": False}
    if sampling["clip_range"] != 1:
        raise ValueError(
            f"sampling.clip_range={sampling['clip_range']}: diffusers thresholds to [-1, 1] only; use 1, or switch "
            "sampling.dynamic_threshold off"
        )
    return {
        "thresholding": True,
        "dynamic_thresholding_ratio": sampling["dynamic_threshold"],
        "sample_max_value": sampling["max_threshold"] or _NO_CAP,
    }


def _beta_keys(settings: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """A schedule as diffusers names it, or as a table; its betas never depend on T, so the range is scaled here."""
    name, num_timesteps = settings["schedule"], settings["num_timesteps"]
    names = {ours: theirs for theirs, ours in _SCHEDULES.items() if class_name == "DDPMScheduler" or ours != "sigmoid"}
    scale = 1000 / num_timesteps if settings["scale_betas"] and name != "cosine" else 1.0
    arguments = {key: settings[key] for key in ("scale_betas", "beta_start", "beta_end", "betas")}
    betas = diffusion.schedule_betas(name, num_timesteps=num_timesteps, **arguments)
    if name not in names:
        return {"trained_betas": betas.tolist()}
    return {
        "beta_schedule": names[name],
        "beta_start": scale * settings["beta_start"],
        "beta_end": scale * settings["beta_end"],
        "trained_betas": None,
    }


def _key_of(choices: Mapping[str, str], field: str, value: str) -> str:
    """The first key with this value."""
    for key, ours in choices.items():
        if ours == value:
            return key
    listed = ", ".join(dict.fromkeys(choices.values()))
    raise ValueError(f"{field}={value!r}: diffusers' schedulers have none such; use one of {listed}")
