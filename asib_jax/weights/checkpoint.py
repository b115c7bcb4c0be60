"""A pytree of arrays on disk, written by orbax and checked by digest when read back.

Of several hosts the first alone writes, and each may read, without waiting for the others: all hold the same state, so
a checkpoint has no parts of other hosts.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import threading
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.traverse_util import flatten_dict

from asib_jax.engine import hosts
from asib_jax.errors import UserError

_ALONE = threading.Lock()  # orbax in two threads at once makes a temporary folder twice


def _digest(tree: dict, about: str) -> str:
    """SHA-256 over the text and the paths, types, shapes and bytes of all leaves; orbax loads flipped bits without
    complaint."""
    sha = hashlib.sha256(about.encode())
    for path, leaf in sorted(flatten_dict(tree).items()):
        array = np.asarray(leaf)
        sha.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sha.hexdigest()


def _checkpointer() -> ocp.StandardCheckpointer:
    """Of this host alone; orbax's default waits for all hosts."""
    host = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=host, active_processes={host})
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def save(path: str | os.PathLike, tree: Any, about: str = "") -> None:
    """Write `tree` to the folder `path` and wait until it is complete; a crash on the way leaves no such folder.

    Tuples, NamedTuples and optimiser states are stored as nested dicts: `flax.serialization.to_state_dict`. Arrays
    leave the devices first, so what is written does not depend on how many there were. What is at `path` already is
    replaced: by a run that goes on and does once more what it did before.

    about: text kept with the arrays, as safe as they are.

    Raises ValueError if a leaf is a string or an array without elements; OSError where it cannot be written, which
    leaves nothing of it.
    """
    if not hosts.is_first():
        return
    arrays, path = jax.device_get(serialization.to_state_dict(tree)), os.path.abspath(path)
    _check_room(path, sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(arrays)))
    metadata = {"sha256": _digest(arrays, about), "about": about}
    try:
        with _ALONE, _checkpointer() as checkpointer:
            checkpointer.save(path, arrays, custom_metadata=metadata, force=True)
            checkpointer.wait_until_finished()
    except Exception as error:
        for begun in glob.glob(f"{glob.escape(path)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(begun, ignore_errors=True)
        # As TensorStore has it of a quota, among others.
        if isinstance(error, ValueError) and (found := re.search(r"(?:OS error |os_error_code=')(\d+)", str(error))):
            raise OSError(int(found[1]), os.strerror(int(found[1])), path) from error
        raise


def check_path(folder: str | os.PathLike) -> None:
    """UserError for the folder of a run in which checkpoints would be written that nobody can read."""
    path = os.path.abspath(folder)
    patterns = sorted({*"*?["} & {*path})  # which orbax looks for as such
    wrong = " and ".join(patterns) or ("bytes that are no UTF-8" if re.search("[\ud800-\udfff]", path) else "")
    if wrong:
        raise UserError(
            f"the run's folder would be {path!r}, where no checkpoint can be kept for {wrong} in its path: change "
            "results_dir, exp_id or the name of the file of configuration"
        )


def _check_room(path: str, size: int) -> None:
    """OSError where the disk has not so many bytes: TensorStore's threads would tell of it one by one."""
    there = os.path.dirname(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if shutil.disk_usage(there).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def restore(path: str | os.PathLike) -> dict[str, Any]:
    """The tree saved at `path` as nested dicts of numpy arrays.

    `flax.serialization.from_state_dict(template, restored)` puts it back into tuples and NamedTuples.

    Raises UserError where there is no checkpoint, or its contents are not what was saved.
    """
    return restore_with_text(path)[0]


def restore_with_text(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """The same, and the text kept with it."""
    path = os.path.abspath(path)
    check_readable(path)
    try:
        with _ALONE, _checkpointer() as checkpointer:
            metadata, tree = _metadata(checkpointer, path), checkpointer.restore(path)
    except UserError:
        raise
    except Exception as error:  # of orbax's and TensorStore's many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {path} is damaged: {type(error).__name__}: {reason}") from error
    if _digest(tree, metadata["about"]) != metadata["sha256"]:
        raise UserError(f"checkpoint {path} is damaged: its contents do not match the digest stored with it")
    return tree, metadata["about"]


def check_readable(path: str | os.PathLike) -> None:
    """UserError where there is no folder `path`; OSError naming what may not be read of it, which is no damage."""
    top = os.fspath(path)
    try:
        os.scandir(top).close()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no checkpoint {top}") from None
    for folder, _, files in os.walk(top, onerror=_raise):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # of a link; that is damage
                os.close(os.open(os.path.join(folder, file), os.O_RDONLY | os.O_NONBLOCK))


def _raise(error: OSError) -> None:
    raise error


def digest(path: str | os.PathLike) -> str:
    """The SHA-256 that `save` has stored with the checkpoint at `path`; reads no arrays. UserError if there is none."""
    path = os.path.abspath(path)
    check_readable(path)
    with _ALONE, _checkpointer() as checkpointer:
        return _metadata(checkpointer, path)["sha256"]


def _metadata(checkpointer: ocp.StandardCheckpointer, path: str) -> dict[str, str]:
    try:
        found = checkpointer.metadata(path).custom_metadata or {}
    except Exception as error:  # of orbax's kinds, for files that are not JSON
        raise UserError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found.get("sha256"), str):
        raise UserError(f"{path} is not a checkpoint by asib_jax: it holds no digest")
    return {"about": "", **found}
