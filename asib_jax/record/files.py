"""Files of a run's folder, read and replaced whole."""

import json
import os
from pathlib import Path
from typing import Any

from asib_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run's folder. UserError if it is missing, as where that is no run's, or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # as some editors begin it
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} is no run folder: {path.name} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}")
    return content


def write(path: Path, content: str | bytes) -> None:
    """Replace the file at once. What raises leaves it as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves an empty file of the right name
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
