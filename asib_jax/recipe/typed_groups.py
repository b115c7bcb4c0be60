"""Nested mappings of plain values, as files and command lines give them, and frozen dataclasses of typed ones."""
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from asib_jax.errors import UserError


def read_group(cls: type, group: Mapping[str, Any], prefix: str) -> Any:
    """A `cls` of the values in `group`; groups within are read alike.

    prefix: of the keys' full names, e.g. "dataset.". Raises UserError for a key that is unknown, missing or of the
    wrong type.
    """
    if not hasattr(group, "items"):
        raise UserError(f"{prefix[:-1]}={group!r} is a {type(group).__name__}; a group of keys is needed")
    hints = typing.get_type_hints(cls)
    for key in group:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            raise UserError(f"unknown key {prefix}{key}" + (f"; did you mean {prefix}{close[0]}?" if close else ""))
    missing = [prefix + key for key in hints if key not in group]
    if missing:
        raise UserError(f"missing keys: {', '.join(missing)}")
    return cls(**{key: _coerce(group[key], hint, prefix + key) for key, hint in hints.items()})


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the field's type; an int serves as a float, one number as a tuple of one."""
    if dataclasses.is_dataclass(hint):
        return read_group(hint, value, f"{key}.")
    if typing.get_origin(hint) is types.UnionType:  # float | None
        return None if value is None else _coerce(value, typing.get_args(hint)[0], key)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(item):
            return value  # the teachers, read already
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(_coerce(v, item, key) for v in values)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{key}={value!r} is of type {type(value).__name__}; {hint.__name__} is needed")
    return value


def flat(group: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a dataclass under its full name: {"tau": 4.0, "dataset.name": ..., ...}.

    A tuple of dataclasses is numbered from 1: the first of `teachers` is "teacher1.name", ...
    """
    values = {}
    for field in dataclasses.fields(group):
        value, name = getattr(group, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{name}.")
        elif typing.get_origin(field.type) is tuple and dataclasses.is_dataclass(typing.get_args(field.type)[0]):
            for number, item in enumerate(value, 1):
                values |= flat(item, f"{prefix}{field.name.removesuffix('s')}{number}.")
        else:
            values[name] = value
    return values
