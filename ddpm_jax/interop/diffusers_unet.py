"""``UNet2DModel`` of diffusers and ``models.UNet``: settings and weights, both ways."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import models
from ddpm_jax.interop.errors import InteropError
from ddpm_jax.models.layers import default_num_groups

# UNet2DModel's own defaults, for what a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of learned time embeddings only
}
# What the one U-Net here has one way of doing.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}

_OUTER = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "time_dense_0": "time_embedding.linear_1",
    "time_dense_1": "time_embedding.linear_2",
    "class_embedding": "class_embedding",
}
_RES_BLOCK = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "time_dense": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "projection": "to_out.0"}
# Attention as checkpoints from before 2023 name it.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def unet_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of ``models.UNet`` that a ``unet/config.json`` asks for, and ``image_size`` and ``channels``.

    Raises:
        InteropError: a setting, or a value of one, that the network here does not have.
    """
    unknown = [key for key in config if key not in _DEFAULTS and not key.startswith("_")]
    if unknown:
        raise InteropError(f"unet setting {unknown[0]}={config[unknown[0]]!r} is not known here")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise InteropError(f"unet is a {config['_class_name']}; only UNet2DModel is read")
    c = _DEFAULTS | dict(config)
    for key, supported in _SUPPORTED.items():
        if c[key] not in supported:
            raise _unsupported(key, c[key], f"only {' and '.join(map(repr, supported))} can be read")
    size, widths = c["sample_size"], list(c["block_out_channels"])
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise _unsupported("sample_size", size, "images are square here")
        size = size[0]
    if not isinstance(size, int):
        raise _unsupported("sample_size", size, "say the height of the images there")
    if any(width % widths[0] for width in widths):
        raise _unsupported("block_out_channels", widths, "each must be a multiple of the first")
    if c["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise _unsupported("time_embedding_dim", c["time_embedding_dim"], f"only {4 * widths[0]} can be read")
    if c["in_channels"] not in (c["out_channels"], c["out_channels"] / 2):
        raise _unsupported("in_channels", c["in_channels"], "it must equal out_channels, or half of it")
    heads = c["attention_head_dim"]
    if heads is not None and any(width % heads for width in widths):
        raise _unsupported("attention_head_dim", heads, f"must divide each of block_out_channels={widths}")
    groups = c["norm_num_groups"] or min(widths[0] // 4, 32)
    if widths[0] % groups:
        raise _unsupported("norm_num_groups", groups, f"must divide the first of block_out_channels={widths}")
    return {
        "image_size": size,
        "channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "base_channels": widths[0],
        "channel_mults": tuple(width // widths[0] for width in widths),
        "num_res_blocks": c["layers_per_block"],
        **_attention_settings(c, size, groups),
        "num_groups": groups,
        "norm_epsilon": float(c["norm_eps"]),
        "time_scale_shift": c["resnet_time_scale_shift"] == "scale_shift",
        "downsample_padding": c["downsample_padding"],
        "flip_sin_to_cos": c["flip_sin_to_cos"],
        "freq_shift": float(c["freq_shift"]),
        "dropout": float(c["dropout"]),
        "num_classes": c["num_class_embeds"] or 0,
        "null_label": not c["num_class_embeds"],
    }


def _attention_settings(c: Mapping[str, Any], size: int, groups: int) -> dict[str, Any]:
    down, up = _attending("down_block_types", c), _attending("up_block_types", c)[::-1]
    down_heights, up_heights = ([size // 2**i for i, attends in enumerate(levels) if attends] for levels in (down, up))
    middle_groups = c["attn_norm_num_groups"]
    if middle_groups is None and c["resnet_time_scale_shift"] == "scale_shift":
        middle_groups = 0  # UNet2DModel leaves that norm out then
    return {
        "attention_resolutions": tuple(down_heights),
        "up_attention_resolutions": None if down_heights == up_heights else tuple(up_heights),
        "middle_attention": c["add_attention"],
        "middle_attention_groups": None if middle_groups == groups else middle_groups,
        "attention_head_channels": c["attention_head_dim"],
    }


def _attending(key: str, c: Mapping[str, Any]) -> list[bool]:
    kinds = [kind.removeprefix("UNetRes") for kind in c[key]]  # as the first release wrote them
    for kind in kinds:
        if kind not in _BLOCKS or ("Up" in kind) != (key == "up_block_types"):
            raise _unsupported(key, kind, f"only {', '.join(_BLOCKS)} can be read")
    if len(kinds) != len(c["block_out_channels"]):
        raise _unsupported(key, kinds, f"needs one for each of block_out_channels={list(c['block_out_channels'])}")
    return [_BLOCKS[kind] for kind in kinds]


def _unsupported(key: str, value: Any, remedy: str) -> InteropError:
    return InteropError(f"unet setting {key}={value!r} is not supported: {remedy}")


def unet_config(model: models.UNet, *, image_size: int, channels: int) -> dict[str, Any]:
    """The ``unet/config.json`` of a network for square images; the inverse of ``unet_settings``."""
    heights = [image_size // 2**level for level in range(len(model.channel_mults))]
    up = model.attention_resolutions if model.up_attention_resolutions is None else model.up_attention_resolutions
    groups = model.num_groups or default_num_groups(model.base_channels)
    middle_groups = model.middle_attention_groups
    if middle_groups is None and model.time_scale_shift:
        middle_groups = groups  # said, because UNet2DModel would leave the norm out
    if middle_groups == 0 and not model.time_scale_shift:
        raise InteropError(
            "config.model.middle_attention_groups=0: UNet2DModel always has that norm where time_scale_shift is off"
        )
    settings = {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": model.out_channels,
        "block_out_channels": [model.base_channels * mult for mult in model.channel_mults],
        "layers_per_block": model.num_res_blocks,
        "down_block_types": [
            "AttnDownBlock2D" if height in model.attention_resolutions else "DownBlock2D" for height in heights
        ],
        "up_block_types": ["AttnUpBlock2D" if height in up else "UpBlock2D" for height in heights[::-1]],
        "attention_head_dim": model.attention_head_channels,
        "add_attention": model.middle_attention,
        "attn_norm_num_groups": middle_groups or None,
        "norm_num_groups": groups,
        "norm_eps": model.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if model.time_scale_shift else "default",
        "downsample_padding": model.downsample_padding,
        "flip_sin_to_cos": model.flip_sin_to_cos,
        "freq_shift": int(model.freq_shift) if model.freq_shift == int(model.freq_shift) else model.freq_shift,
        "dropout": model.dropout,
        "num_class_embeds": model.num_classes + model.null_label if model.num_classes else None,
    }
    return {"_class_name": "UNet2DModel"} | _DEFAULTS | settings


def to_params(weights: Mapping[str, np.ndarray], model: models.UNet, *, image_size: int, channels: int) -> Any:
    """The parameters of ``model`` from the tensors of a ``UNet2DModel``, float32.

    Raises:
        InteropError: a tensor is missing, not known, or of another shape; the message names it.
    """
    weights = {_without_old_names(name): x for name, x in weights.items()}
    params = {}
    for path, ours, name, shape in _tensors(model, image_size, channels):
        if name not in weights:
            raise InteropError(f"tensor {name} is missing: the file is of another network than its config says")
        found = np.asarray(weights.pop(name))
        if tuple(found.shape) != shape and not _is_pointwise(found.shape, shape):
            raise InteropError(
                f"tensor {name} has shape {list(found.shape)}, and its config asks for {list(shape)}: "
                "the file is of another network"
            )
        params[path] = _to_ours(found.astype(np.float32), path, ours)
    if weights:
        raise InteropError(f"tensor {min(weights)} is not known: the file is of another network than its config says")
    return flax.traverse_util.unflatten_dict(params)


def from_params(params: Any, model: models.UNet, *, image_size: int, channels: int) -> dict[str, np.ndarray]:
    """The tensors of a ``UNet2DModel``, float32, from parameters here."""
    leaves = flax.traverse_util.flatten_dict(params)
    return {
        name: _to_theirs(np.asarray(leaves[path], np.float32), path, shape)
        for path, _, name, shape in _tensors(model, image_size, channels)
    }


def _tensors(
    model: models.UNet, image_size: int, channels: int
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], str, tuple[int, ...]]]:
    """For each parameter: its path and shape here, its name and shape there."""
    x_t = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    label = number if model.num_classes else None
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), x_t, number, label)["params"]
    for path, x in flax.traverse_util.flatten_dict(shapes).items():
        yield path, x.shape, _name(path, len(model.channel_mults)), _their_shape(path, x.shape)


def _name(path: tuple[str, ...], num_levels: int) -> str:
    """("down_1_block_0", "norm_0", "scale") -> "down_blocks.1.resnets.0.norm1.weight"."""
    leaf = "bias" if path[-1] == "bias" else "weight"
    if path[0] in _OUTER:
        return f"{_OUTER[path[0]]}.{leaf}"
    where, *rest = path[0].split("_")
    if where == "middle":  # middle_block_0, middle_block_1, middle_attention
        kind, index = (*rest, "0")[:2]
        place = "mid_block"
    else:  # down_1_block_0, down_1_attention_0, down_1_downsample
        level, kind, index = (*rest, "0")[:3]
        place = f"down_blocks.{level}" if where == "down" else f"up_blocks.{num_levels - 1 - int(level)}"
    if kind in ("downsample", "upsample"):
        return f"{place}.{kind}rs.0.conv.{leaf}"
    if kind == "block":
        return f"{place}.resnets.{index}.{_RES_BLOCK[path[1]]}.{leaf}"
    return f"{place}.attentions.{index}.{_ATTENTION[path[1]]}.{leaf}"


def _their_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] != "kernel":
        return shape
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return (shape[1], shape[0], 1, 1) if path[-2] == "shortcut" else (shape[1], shape[0])


def _is_pointwise(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a dense layer was stored as a 1x1 convolution."""
    return len(wanted) == 2 and found == (*wanted, 1, 1)


def _to_ours(x: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Output, input, height, width -> height, width, input, output; what is no kernel stays as it is."""
    if path[-1] != "kernel":
        return x
    x = x.transpose(2, 3, 1, 0) if len(shape) == 4 else x.reshape(x.shape[:2]).T
    return np.ascontiguousarray(x)


def _to_theirs(x: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    if path[-1] != "kernel":
        return x
    x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T.reshape(shape)
    return np.ascontiguousarray(x)


def _without_old_names(name: str) -> str:
    if ".attentions." in name:
        for old, new in _OLD_ATTENTION.items():
            name = name.replace(old, new)
    return name
