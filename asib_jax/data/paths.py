"""Paths as users write them."""

from pathlib import Path

from asib_jax.errors import UserError


def expanded(path: str, key: str) -> Path:
    """`path` with the home that its ~ stands for. UserError naming `key`, which holds it, for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={path!r}: {error} Write the path out") from error
