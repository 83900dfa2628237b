"""Dotted names of the fields of nested dataclasses, such as a ``Config``: "train.batch_size"."""

import dataclasses
import types
import typing
from typing import Any


def get(config: Any, field: str) -> Any:
    """The value of a field by its dotted name, as in ``--config.<field>``; a list comes as the tuple it stands for."""
    value = config
    for name in field.split("."):
        value = getattr(value, name)
    return tuple(value) if isinstance(value, list) else value


def names_of(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields."""
    names = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            names += names_of(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"batch_size": 4}} -> {"train.batch_size": 4}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def type_error(cls: type, field: str, value: Any) -> str | None:
    """What is wrong with the type of a value for a field: "must be int, not str"; None where it fits."""
    wanted = _type_of(cls, field)
    if typing.get_origin(wanted) is tuple:
        numbers = (int, float) if float in typing.get_args(wanted) else (int,)
        fits = isinstance(value, tuple | list) and all(type(x) in numbers for x in value)
    else:
        options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
        # An int is a fine float, and True is a poor int.
        options += (int,) if float in options else ()
        fits = isinstance(value, options) and (bool in options or not isinstance(value, bool))
    name = getattr(wanted, "__name__", str(wanted)) if typing.get_origin(wanted) is None else str(wanted)
    return None if fits else f"must be {name}, not {type(value).__name__}"


def brief(value: Any) -> str:
    """A value in a message of one line: a table of betas is a thousand numbers."""
    if isinstance(value, tuple | list) and len(value) > 8:
        return f"({value[0]!r}, {value[1]!r}, ..., {value[-1]!r})"
    return repr(value)


def _type_of(cls: Any, field: str) -> Any:
    for name in field.split("."):
        cls = typing.get_type_hints(cls)[name]
    return cls
