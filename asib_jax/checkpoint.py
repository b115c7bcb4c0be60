"""A pytree of arrays on disk, written by orbax and checked by digest when read back."""
import hashlib
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.traverse_util import flatten_dict


def _digest(tree: dict) -> str:
    """SHA-256 over the paths, types, shapes and bytes of all leaves; orbax loads flipped bits without complaint."""
    sha = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(tree).items()):
        array = np.asarray(leaf)
        sha.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sha.hexdigest()


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write `tree` to the new folder `path` and wait until it is complete; a crash on the way leaves no such folder.

    Tuples, NamedTuples and optimiser states are stored as nested dicts: `flax.serialization.to_state_dict`. Arrays
    leave the devices first, so what is written does not depend on how many there were.

    Raises:
        ValueError: `path` exists, or a leaf is a string or an array without elements.
    """
    arrays = jax.device_get(serialization.to_state_dict(tree))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(path), arrays, custom_metadata={"sha256": _digest(arrays)})
        checkpointer.wait_until_finished()


def restore(path: str | os.PathLike) -> dict[str, Any]:
    """The tree saved at `path` as nested dicts of numpy arrays.

    `flax.serialization.from_state_dict(template, restored)` puts it back into tuples and NamedTuples.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: its contents are not what was saved.
    """
    path = os.path.abspath(path)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path)
        saved = checkpointer.metadata(path).custom_metadata["sha256"]
    if _digest(tree) != saved:
        raise ValueError(f"checkpoint {path} is damaged: its contents do not match the digest stored with it")
    return tree
