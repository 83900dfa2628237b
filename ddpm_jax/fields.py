"""Dotted names of the fields of nested dataclasses, such as a ``Config``: "train.batch_size"."""

import dataclasses
import difflib
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


def nearest(name: str, names: list[str]) -> str:
    """The one of ``names`` most like a misspelt one; the same last part counts for more than the likeness."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    same_leaf = [n for n in names if n.rsplit(".", maxsplit=1)[-1] == name.rsplit(".", maxsplit=1)[-1]]
    return same_leaf[0] if len(same_leaf) == 1 else matches[0]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"batch_size": 4}} -> {"train.batch_size": 4}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def type_error(cls: type, field: str, value: Any) -> str | None:
    """What is wrong with the type of a value for a field: "must be int, not str"; None where it fits."""
    wanted = _type_of(cls, field)
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    name = wanted.__name__ if type(wanted) is type else str(wanted)
    return None if any(_fits(value, option) for option in options) else f"must be {name}, not {type(value).__name__}"


def _fits(value: Any, wanted: Any) -> bool:
    if typing.get_origin(wanted) is tuple:
        return isinstance(value, tuple | list) and all(_fits(x, typing.get_args(wanted)[0]) for x in value)
    # An int is a fine float, and True is a poor int.
    return isinstance(value, (wanted, int) if wanted is float else wanted) and (
        wanted is bool or not isinstance(value, bool)
    )


def brief(value: Any) -> str:
    """A value in a message of one line: a table of betas is a thousand numbers."""
    if isinstance(value, tuple | list) and len(value) > 8:
        return f"({value[0]!r}, {value[1]!r}, ..., {value[-1]!r})"
    return repr(value)


def differences(a: Any, b: Any, fields: list[str]) -> list[str]:
    """One line for each of the fields in which two objects differ: "model.dropout: 0.1 != 0.0"."""
    pairs = ((field, get(a, field), get(b, field)) for field in fields)
    return [f"{field}: {brief(one)} != {brief(other)}" for field, one, other in pairs if one != other]


def _type_of(cls: Any, field: str) -> Any:
    for name in field.split("."):
        cls = typing.get_type_hints(cls)[name]
    return cls
