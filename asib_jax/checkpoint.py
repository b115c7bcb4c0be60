"""A pytree of arrays on disk, written by orbax and checked by digest when read back.

Of several hosts the first alone writes, and each may read, without waiting for the others: all hold the same state, so
a checkpoint has no parts of other hosts.
"""
import hashlib
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.traverse_util import flatten_dict

from asib_jax import hosts
from asib_jax.errors import UserError


def _tree_digest(tree: dict) -> str:
    """SHA-256 over the paths, types, shapes and bytes of all leaves; orbax loads flipped bits without complaint."""
    sha = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(tree).items()):
        array = np.asarray(leaf)
        sha.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sha.hexdigest()


def _checkpointer() -> ocp.StandardCheckpointer:
    """Of this host alone; orbax's default waits for all hosts."""
    host = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=host, active_processes={host})
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write `tree` to the new folder `path` and wait until it is complete; a crash on the way leaves no such folder.

    Tuples, NamedTuples and optimiser states are stored as nested dicts: `flax.serialization.to_state_dict`. Arrays
    leave the devices first, so what is written does not depend on how many there were.

    Raises:
        UserError: `path` exists, or a leaf is a string or an array without elements.
    """
    if not hosts.is_first():
        return
    arrays = jax.device_get(serialization.to_state_dict(tree))
    with _checkpointer() as checkpointer:
        checkpointer.save(os.path.abspath(path), arrays, custom_metadata={"sha256": _tree_digest(arrays)})
        checkpointer.wait_until_finished()


def restore(path: str | os.PathLike) -> dict[str, Any]:
    """The tree saved at `path` as nested dicts of numpy arrays.

    `flax.serialization.from_state_dict(template, restored)` puts it back into tuples and NamedTuples.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        UserError: its contents are not what was saved.
    """
    path = os.path.abspath(path)
    with _checkpointer() as checkpointer:
        tree = checkpointer.restore(path)
    if _tree_digest(tree) != digest(path):
        raise UserError(f"checkpoint {path} is damaged: its contents do not match the digest stored with it")
    return tree


def digest(path: str | os.PathLike) -> str:
    """The SHA-256 stored with the checkpoint at `path`, over its paths, types, shapes and values; reads no arrays.

    Raises UserError if there is none that `save` wrote.
    """
    path = os.path.abspath(path)
    with _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(path).custom_metadata or {}
    if "sha256" not in metadata:
        raise UserError(f"{path} is not a checkpoint by asib_jax: it holds no digest")
    return metadata["sha256"]
