"""What was set beside a configuration, as text that tells runs of it apart."""

import hashlib
from collections.abc import Collection
from typing import Any

from asib_jax.recipe import keys
from asib_jax.recipe.recipe import Recipe

_APART = ("seed", "results_dir", "exp_id", "resume")  # which a run's folder and row have anyway, or where it is


def text(recipe: Recipe, changed: Collection[str]) -> str:
    """The `changed` keys with their values, "kd_alpha=0.5 teacher1.name=resnet20", sorted; "": there is none."""
    values = keys.flat(recipe)
    return " ".join(f"{name}={_compact(values[name])}" for name in sorted(values.keys() & {*changed} - {*_APART}))


def digest(overrides: str) -> str:
    """Four hexadecimal digits of that text; "" of none."""
    return hashlib.sha256(overrides.encode(errors="surrogateescape")).hexdigest()[:4] if overrides else ""


def _compact(value: Any) -> str:
    if isinstance(value, str):  # in quotation marks where it would look like more than one
        return value if value and not set(value) & set(" \t\n\"'") else repr(value)
    return repr(value).replace(" ", "")
