"""Folders of diffusers' ``DDPMPipeline`` and ``DDIMPipeline``, in and out, without diffusers and without torch.

``google/ddpm-cifar10-32`` and its like are such folders. Weights are read from safetensors; the older ``.bin`` files
need torch, which then unpickles nothing but tensors.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import models
from ddpm_jax.interop import diffusers_scheduler, diffusers_unet
from ddpm_jax.interop.errors import InteropError

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FORMAT_VERSION = "0.35.0"  # of diffusers, whose files these are like
_IMAGE_FIELDS = ("image_size", "channels")


class Pipeline(NamedTuple):
    """A network with its weights, and how it was trained and is sampled from."""

    model: models.UNet
    params: Any  # model.apply({"params": params}, x_t, t, label)
    diffusion: dict[str, Any]  # fields of config.DiffusionConfig
    sampling: dict[str, Any]  # fields of config.SamplingConfig


class Folder(NamedTuple):
    """The files of a pipeline, read and understood but for the weights."""

    unet: dict[str, Any]  # attributes of models.UNet, and image_size and channels
    diffusion: dict[str, Any]
    sampling: dict[str, Any]
    weights: Path


def load_pipeline(path: str) -> Pipeline:
    """A pipeline from a folder, or from the Hugging Face hub, which keeps a copy in its cache.

    Args:
        path: a folder, or a name on the hub such as "google/ddpm-cifar10-32".

    Raises:
        InteropError: nothing is there, or it holds a setting or a tensor that is not known here.
    """
    return load_folder(read_folder(path))


def read_folder(path: str) -> Folder:
    """All of a pipeline but its weights; see ``load_pipeline``."""
    root = Path(path) if Path(path).is_dir() else _download(path)
    unet, scheduler = _part(root, "unet", "config.json"), _part(root, "scheduler", "scheduler_config.json")
    try:
        settings = diffusers_unet.unet_settings(_read_json(unet))
        diffusion, sampling = diffusers_scheduler.schedule_settings(_read_json(scheduler))
    except ValueError as error:
        raise InteropError(f"{path}: {error}") from None
    twice = settings["out_channels"] == 2 * settings["channels"]
    if diffusion["learned_variance"] and not twice:
        raise InteropError(f"{path}: variance_type='learned_range', but the unet has no output for a variance")
    diffusion["learned_variance"] = twice  # DDIMScheduler's file does not tell
    found = [unet.parent / name for name in WEIGHTS if (unet.parent / name).is_file()]
    if not found:
        raise InteropError(f"{unet.parent}: holds no weights; {WEIGHTS[0]} is missing")
    return Folder(settings, diffusion, sampling, found[0])


def load_folder(folder: Folder, **attributes: Any) -> Pipeline:
    """The network of a folder with its weights; ``attributes`` of the U-Net, such as dtype, override the folder's."""
    settings = dict(folder.unet)
    image = {name: settings.pop(name) for name in _IMAGE_FIELDS}
    model = models.UNet(**settings | attributes)
    try:
        params = diffusers_unet.to_params(_read_weights(folder.weights), model, **image)
    except InteropError as error:
        raise InteropError(f"{folder.weights}: {error}") from None
    return Pipeline(model, params, folder.diffusion, folder.sampling)


def save_pipeline(
    path: str,
    model: models.Network,
    params: Any,
    *,
    image_size: int,
    channels: int = 3,
    diffusion: Mapping[str, Any],
    sampling: Mapping[str, Any],
) -> None:
    """Writes a folder that ``DDPMPipeline.from_pretrained`` and ``DDIMPipeline.from_pretrained`` load.

    Those pipelines pass no labels: of a network with classes use the loaded pipeline's ``unet`` and ``scheduler``.

    Args:
        path: the folder; must not exist, or be empty.
        model: the network.
        params: its parameters.
        image_size: height and width of its images.
        channels: of its images.
        diffusion: fields of ``config.DiffusionConfig``, as from ``load_pipeline`` or ``dataclasses.asdict``.
        sampling: fields of ``config.SamplingConfig``.

    Raises:
        InteropError: the folder is not empty, or the network or its chain has what diffusers has no word for.
    """
    if not isinstance(model, models.UNet):
        raise InteropError(f"{type(model).__name__}: diffusers has no such network; only model.kind='unet' goes there")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InteropError(f"{path}: is there already; choose another folder")
    kind = "DDPM" if sampling["method"] == "ddpm" else "DDIM"
    if diffusion["learned_variance"]:  # DDIMScheduler takes no such output
        kind, sampling = "DDPM", {**sampling, "variance": "learned"}
    try:
        scheduler = diffusers_scheduler.scheduler_config(diffusion, sampling, f"{kind}Scheduler")
    except ValueError as error:
        raise InteropError(str(error)) from None
    files = {
        "model_index.json": _index(kind),
        "unet/config.json": diffusers_unet.unet_config(model, image_size=image_size, channels=channels),
        "scheduler/scheduler_config.json": scheduler,
    }
    weights = diffusers_unet.from_params(params, model, image_size=image_size, channels=channels)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(scratch, files, weights)
        if target.exists():
            target.rmdir()
        scratch.chmod(0o755)  # mkdtemp gives 0700
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(root: Path, files: Mapping[str, Mapping[str, Any]], weights: Mapping[str, np.ndarray]) -> None:
    import safetensors.numpy

    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        text = json.dumps({**content, "_diffusers_version": FORMAT_VERSION}, indent=2, sort_keys=True)
        (root / name).write_text(text + "\n")
    # diffusers asks for the format; "pt" says that the layout is PyTorch's.
    safetensors.numpy.save_file(dict(weights), root / "unet" / WEIGHTS[0], metadata={"format": "pt"})


def _index(kind: str) -> dict[str, Any]:
    return {
        "_class_name": f"{kind}Pipeline",
        "scheduler": ["diffusers", f"{kind}Scheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


def _part(root: Path, folder: str, name: str) -> Path:
    """unet/config.json, or config.json beside model_index.json as the first checkpoints have it."""
    for path in (root / folder / name, root / name):
        if path.is_file():
            return path
    raise InteropError(f"{root}: no folder of a diffusers pipeline; {folder}/{name} is missing")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InteropError(f"{path}: no readable JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise InteropError(f"{path}: holds a {type(content).__name__}, not an object; fetch it again")
    return content


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InteropError(f"is damaged or no safetensors ({_first_line(error)}); fetch it again") from None


def _read_bin(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a pickle that holds tensors; anything else in it is refused and not run."""
    try:
        import torch
    except ImportError:
        raise InteropError("a .bin file needs PyTorch; pip install torch, or fetch the .safetensors") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged zip, or a pickle with code in it, raises
        raise InteropError(f"is damaged, or holds more than tensors ({_first_line(error)}); do not use it") from None
    wrong = [name for name, x in state.items() if not torch.is_tensor(x)] if isinstance(state, dict) else ["all of it"]
    if wrong:
        raise InteropError(f"{wrong[0]} is no tensor; do not use it")
    return {name: x.float().numpy() for name, x in state.items()}


def _download(name: str) -> Path:
    """A pipeline of the hub, in the hub's own cache."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    configs = ["model_index.json", "config.json", "unet/config.json"]
    configs += ["scheduler_config.json", "scheduler/scheduler_config.json"]

    def fetch(weights: str) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*configs, weights, f"unet/{weights}"]))

    try:
        root = fetch(WEIGHTS[0])
        if not any((root / folder / WEIGHTS[0]).is_file() for folder in ("", "unet")):
            root = fetch(WEIGHTS[1])
        return root
    except (HFValidationError, RepositoryNotFoundError):
        raise InteropError(f"{name}: neither a folder nor a pipeline on huggingface.co; check the name") from None
    except LocalEntryNotFoundError:
        raise InteropError(
            f"{name}: no such folder; huggingface.co cannot be reached, and its cache has none"
        ) from None
    except OSError as error:  # of the network, of the disk, or an answer of the hub's
        raise InteropError(f"{name}: no such folder, and the hub answers: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
