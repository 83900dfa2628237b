"""Weights of Ho et al.'s own code (TensorFlow, 2020), from an .npz of its variables by their names.

Written from the code's names and shapes; no original file was at hand to try it on.
"""

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import models
from ddpm_jax.interop.errors import InteropError

_EMA = "/ExponentialMovingAverage"
_OUTER = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "norm_out",
    "time_dense_0": "temb/dense0",
    "time_dense_1": "temb/dense1",
}
_RES_BLOCK = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "time_dense": "temb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "nin_shortcut",
}
_ATTENTION = {"norm": "norm", "query": "q", "key": "k", "value": "v", "projection": "proj_out"}
_LEAVES = {"kernel": "W", "bias": "b"}
_NORM_LEAVES = {"scale": "gamma", "bias": "beta"}


class Weights(NamedTuple):
    """The network of a file, and its parameters."""

    model: models.UNet
    channels: int  # of its images
    params: Any
    ema_params: Any  # None where the file has no averages


def load_ddpm(path: str, *, image_size: int) -> Weights:
    """The U-Net of an .npz whose keys are TensorFlow variable names, such as ``model/down_0/block_0/conv1/W``.

    Widths, blocks and the levels with attention are read from the names and shapes. An average is the variable's name
    with ``/ExponentialMovingAverage``. Convolutions and dense layers are stored as here: [height, width, in, out].

    Args:
        path: the file.
        image_size: of the images, which no variable tells: 32 for CIFAR-10, 256 for the others.

    Raises:
        InteropError: no such file, or a variable is missing, not known or of another shape.
    """
    variables = {name.removesuffix(":0"): x for name, x in _read(path).items()}
    averages = {name.removesuffix(_EMA): x for name, x in variables.items() if name.endswith(_EMA)}
    raw = {name: x for name, x in variables.items() if not name.endswith(_EMA)}
    model, channels = _network(raw or averages, image_size)
    try:
        params = _params(raw, model, image_size, channels)
        ema_params = _params(averages, model, image_size, channels) if averages else None
    except InteropError as error:
        raise InteropError(f"{path}: {error}") from None
    return Weights(model, channels, params, ema_params)


def _network(variables: Mapping[str, np.ndarray], image_size: int) -> tuple[models.UNet, int]:
    """The U-Net that has these variables."""

    def width(name: str, axis: int) -> int:
        if name not in variables:
            raise InteropError(f"variable {name} is missing: this is no file of that code's variables")
        return variables[name].shape[axis]

    found = [re.match(r"model/down_(\d+)/(block|attn)_(\d+)/", name) for name in variables]
    blocks = {(int(m[1]), m[2], int(m[3])) for m in found if m}
    levels = 1 + max((level for level, _, _ in blocks), default=0)
    base = width("model/conv_in/W", 3)
    widths = [width(f"model/down_{level}/block_0/conv1/W", 3) for level in range(levels)]
    if base < 4 or any(w % base for w in widths) or image_size % 2 ** (levels - 1):
        raise InteropError(
            f"variables of widths {base}, {widths} make no network for image_size={image_size}; check --image_size"
        )
    attending = sorted({level for level, kind, _ in blocks if kind == "attn"})
    model = models.UNet(
        out_channels=width("model/conv_out/W", 3),
        base_channels=base,
        channel_mults=tuple(w // base for w in widths),
        num_res_blocks=1 + max(i for _, kind, i in blocks if kind == "block"),
        attention_resolutions=tuple(image_size // 2**level for level in attending),
    )
    return model, width("model/conv_in/W", 2)


def _params(variables: Mapping[str, np.ndarray], model: models.UNet, image_size: int, channels: int) -> Any:
    """The parameters of ``model``; each of the variables is used."""
    rest = dict(variables)
    x_t = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), x_t, t)["params"]
    params = {}
    for leaf, wanted in flax.traverse_util.flatten_dict(shapes).items():
        name = _name(leaf)
        if name not in rest:
            raise InteropError(f"variable {name} is missing")
        x = rest.pop(name)
        if x.shape != wanted.shape:
            raise InteropError(
                f"variable {name} has shape {list(x.shape)}, and the others ask for {list(wanted.shape)}"
            )
        params[leaf] = x.astype(np.float32)
    unknown = [name for name in rest if name.startswith("model/")]  # others are the optimizer's, and the step
    if unknown:
        raise InteropError(f"variable {min(unknown)} is not known")
    return flax.traverse_util.unflatten_dict(params)


def _name(path: tuple[str, ...]) -> str:
    """("down_1_block_0", "norm_0", "scale") -> "model/down_1/block_0/norm1/gamma"."""
    leaf = (_NORM_LEAVES if path[-2].startswith("norm") else _LEAVES)[path[-1]]
    if path[0] in _OUTER:
        return f"model/{_OUTER[path[0]]}/{leaf}"
    where, *rest = path[0].split("_")
    if where == "middle":  # middle_block_0, middle_attention, middle_block_1
        place, kind = "mid", rest[0]
        index = str(int(rest[1]) + 1) if kind == "block" else "1"
    else:
        place, kind = f"{where}_{rest[0]}", rest[1]
        index = rest[2] if len(rest) > 2 else ""
    if kind in ("downsample", "upsample"):
        return f"model/{place}/{kind}/conv/{leaf}"
    part = f"block_{index}/{_RES_BLOCK[path[1]]}" if kind == "block" else f"attn_{index}/{_ATTENTION[path[1]]}"
    return f"model/{place}/{part}/{leaf}"


def _read(path: str) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise InteropError(f"{path}: there is no such file; give the .npz of the variables")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InteropError(f"{path}: no readable .npz of arrays ({reason})") from None
