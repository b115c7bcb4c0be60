"""Paths as users write them."""

from pathlib import Path

from asib_jax.errors import UserError


def expanded(path: str, key: str) -> Path:
    """`path` with the home that its ~ stands for. UserError naming `key`, which holds it, for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={path!r}: {error} Write the path out") from error


def existing(path: str, key: str) -> Path:
    """`expanded`, and UserError for a path at which there is neither a file nor a folder."""
    found = expanded(path, key)
    if not found.exists():
        raise UserError(f"{key} = {path!r} does not exist")
    if not (found.is_file() or found.is_dir()):
        raise UserError(f"{key} = {path!r} is a pipe, socket or device; give a file or a folder")
    return found
