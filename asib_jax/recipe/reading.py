"""From a configuration, which is nested mappings of plain values as files and command lines give them, to a recipe."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from asib_jax.data import recognise
from asib_jax.errors import UserError
from asib_jax.recipe.groups import TeacherRecipe
from asib_jax.recipe.keys import idle, numbered
from asib_jax.recipe.recipe import Recipe

# Keys of earlier versions, each with the value that is every run's now; None: it changed no result.
RETIRED = {"scale_lr_with_devices": False, "bank_memory_gb": None}
# Keys that came later, each with what every run did before, where that is not its default now.
EARLIER = {"synergy_base": "none", "ib_mbm_kv": "feat"}


def read(config: Mapping[str, Any]) -> Recipe:
    """The recipe `config` (a ConfigDict or a nested dict) describes.

    An empty `dataset.name` becomes that of what lies at `dataset.path`.

    Raises:
      UserError: a key is unknown (the nearest valid one is named), missing or of the wrong type; or, with an empty
        `dataset.name`, nothing known lies at `dataset.path`.
    """
    return _read(config, complete=True)


def read_stored(config: Mapping[str, Any]) -> Recipe:
    """The same of a configuration that an earlier version may have written: keys that came later have their defaults,
    or where they act what was done before (`EARLIER`); those that are gone (`RETIRED`) are left out."""
    if not hasattr(config, "items"):
        return _read(config, complete=False)
    recipe = _read({key: value for key, value in config.items() if key not in RETIRED}, complete=False)
    before: dict[str, Any] = {key: EARLIER[key] for key in EARLIER.keys() - config.keys() - idle(recipe)}
    return dataclasses.replace(recipe, **before)


def _read(config: Mapping[str, Any], *, complete: bool) -> Recipe:
    if not hasattr(config, "items"):
        raise UserError(f"a configuration is a group of keys; found a {type(config).__name__}")
    config = dict(config.items())
    if "teachers" in config:
        raise UserError("unknown key teachers; teachers are the groups teacher1, teacher2, ...")
    names = sorted((key for key in config if re.fullmatch("teacher[0-9]{1,9}", str(key))), key=lambda key: int(key[7:]))
    if names != [f"teacher{k + 1}" for k in range(len(names))]:
        raise UserError(f"teachers must be named teacher1, teacher2, ... without a gap; found {names}")
    groups = tuple(read_group(TeacherRecipe, config.pop(name), f"{name}.", complete=complete) for name in names)
    recipe = read_group(Recipe, {**config, "teachers": groups}, "", complete=complete)
    if recipe.dataset.name:
        return recipe
    return dataclasses.replace(
        recipe, dataset=dataclasses.replace(recipe.dataset, name=recognise.source(recipe.dataset.path))
    )


def read_group(cls: Any, group: Mapping[str, Any], prefix: str, *, complete: bool) -> Any:
    """A `cls` of the values in `group`; groups within are read alike.

    prefix: of the keys' full names, e.g. "dataset.". complete: every key has to be there; else the others have their
    defaults. Raises UserError for a key that is unknown, missing or of the wrong type.
    """
    if not hasattr(group, "items"):
        raise UserError(f"{prefix[:-1]}={group!r} is a {type(group).__name__}; a group of keys is needed")
    hints = typing.get_type_hints(cls)
    for key in group:
        if key not in hints:
            names = [f"{name[:-1]}1" if numbered(hint) else name for name, hint in hints.items()]
            close = difflib.get_close_matches(str(key), names, n=1)
            raise UserError(f"unknown key {prefix}{key}" + (f"; did you mean {prefix}{close[0]}?" if close else ""))
    missing = [prefix + key for key in hints if key not in group]
    if missing and complete:
        raise UserError(f"missing keys: {', '.join(missing)}")
    return cls(**{key: _coerce(value, hints[key], prefix + key, complete) for key, value in group.items()})


def _coerce(value: Any, hint: Any, key: str, complete: bool) -> Any:
    """`value` as the field's type; an int serves as a float, one number as a tuple of one."""
    if dataclasses.is_dataclass(hint):
        return read_group(hint, value, f"{key}.", complete=complete)
    if numbered(hint):
        return value  # the teachers, read already
    if typing.get_origin(hint) is types.UnionType:  # float | None
        return None if value is None else _coerce(value, typing.get_args(hint)[0], key, complete)
    if typing.get_origin(hint) is tuple:
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(_coerce(v, typing.get_args(hint)[0], key, complete) for v in values)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{key}={value!r} is of type {type(value).__name__}; {hint.__name__} is needed")
    return value
