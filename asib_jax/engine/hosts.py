"""Several hosts: how they meet, what they must agree on, how they end together; the first alone writes.

Every host runs the same command and holds the same state. Collectives are matched by their order alone: hosts that call
compiled programs in different orders mix up their values without an error. So nothing that only one host finds, a file
or free memory, may decide what is computed.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from asib_jax.engine.devices import AXIS, run_devices
from asib_jax.errors import UserError


@contextlib.contextmanager
def joined(
    coordinator: str | None, processes: int | None, process: int | None, tell: Callable[[BaseException], int]
) -> Iterator[None]:
    """Several hosts joined for what is done within. Enter before any device is used; without `coordinator` do nothing.

    coordinator: HOST:PORT of process 0, with the number of processes and which of them this is; or "auto": all as jax
    finds it in SLURM, Open MPI or Kubernetes. Leaving by an exception ends the process with the status that
    `tell(exception)` returns, and thereby the other hosts, once they wait for this one.

    Raises UserError for an incomplete or malformed address, or if there is no cluster to ask. Where the hosts do not
    meet (within five minutes; at once where the port is taken) jax ends the process itself.
    """
    if not coordinator:
        if processes is not None or process is not None:
            raise UserError("--processes and --process need --coordinator=HOST:PORT, which is process 0's")
        yield
        return
    _join(coordinator, processes, process)
    try:
        yield
    except BaseException as error:
        _end(tell(error))


def _join(coordinator: str, processes: int | None, process: int | None) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    if coordinator == "auto" and processes is process is None:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(
                f"--coordinator=auto: {error} It finds SLURM (inside srun), Open MPI and Kubernetes; "
                "elsewhere give --coordinator=HOST:PORT --processes --process"
            ) from error
        return
    if not re.fullmatch(r".+:\d+", coordinator) or process not in range(processes or 0):
        raise UserError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: give HOST:PORT of "
            "process 0, how many there are and which this is, from 0; or --coordinator=auto alone"
        )
    # Without detection, which in an srun would give each process one device instead of all of its host.
    jax.distributed.initialize(coordinator, processes, process, cluster_detection_method="deactivate")


def _end(status: int) -> None:
    """An ordinary exit would wait for the other hosts, and they in a collective for this one."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1)  # the others may have an error of their own to tell before this end aborts them
    os._exit(status)


def is_first() -> bool:
    """Whether this host writes what is written once."""
    return jax.process_index() == 0


def everywhere(found: Sequence[bool]) -> list[bool]:
    """Of each finding, as many on every host, whether all hosts made it."""
    return (
        list(found) if jax.process_count() == 1 else [bool(each) for each in np.all(_of_all(np.array(found)), axis=0)]
    )


def anywhere(found: Sequence[bool]) -> list[bool]:
    """Of each finding, as many on every host, whether any host made it."""
    return (
        list(found) if jax.process_count() == 1 else [bool(each) for each in np.any(_of_all(np.array(found)), axis=0)]
    )


def same_everywhere(values: Mapping[str, Any]) -> None:
    """UserError, on every host, unless the values, of the same names on each, are the same; arrays by content."""
    if jax.process_count() == 1:
        return
    digests = _of_all(np.stack([_digest(value) for value in values.values()]))  # [hosts, values, 32]
    differ = (digests != digests[0]).any(axis=-1)
    if differ.any():
        told = [
            f"{name} is not the same on host {', '.join(map(str, np.flatnonzero(wrong)))} as on host 0"
            + (f" (here {value!r})" if isinstance(value, str | int | float) else "")
            for (name, value), wrong in zip(values.items(), differ.T)
            if wrong.any()
        ]
        raise UserError("; ".join(told) + ". Every host needs the same command, data and weights")


@functools.cache
def _gather() -> Callable[[np.ndarray], jax.Array]:
    return jax.pmap(lambda values: jax.lax.all_gather(values, AXIS), AXIS, out_axes=None, devices=run_devices(0))


def _of_all(values: np.ndarray) -> np.ndarray:
    """[hosts, ...]: the values of every host, which are of one shape."""
    here = jax.local_device_count()
    return np.asarray(_gather()(np.stack([values] * here)))[::here]


def _digest(value: Any) -> np.ndarray:
    """SHA-256, uint8 [32]."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        sha.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.Array | np.ndarray):
            sha.update(f"{leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
        else:
            sha.update(repr(leaf).encode())
    return np.frombuffer(sha.digest(), np.uint8)
