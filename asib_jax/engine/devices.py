"""Devices: which ones a run has, and how arrays get onto them.

Of several hosts each gives and gets the arrays of its own devices.
"""

import collections
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asib_jax.errors import UserError

AXIS = "devices"


def run_devices(count: int) -> list[jax.Device]:
    """The first `count` devices of each host, or all of them for 0, host by host.

    Raises UserError where there are fewer, or the hosts have not as many, which pmap asks for.
    """
    hosts = [jax.local_devices(process_index=host) for host in range(jax.process_count())]
    if len({len(devices) for devices in hosts}) > 1:
        raise UserError(
            f"the hosts have {[len(devices) for devices in hosts]} devices: give each as many, with "
            "CUDA_VISIBLE_DEVICES"
        )
    if not 0 <= count <= len(hosts[0]):
        raise UserError(f"num_devices={count}, but {len(hosts[0])} are here: {hosts[0]}; 0 takes all")
    return [device for devices in hosts for device in devices[: count or len(devices)]]


def _places_here(devices: Sequence[jax.Device]) -> slice:
    """The places of this host's devices among all. pmap takes and gives a host's arrays; none holds another's."""
    here = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
    return slice(here[0], here[-1] + 1)


def check_batch(batch_size: int, devices: Sequence[jax.Device]) -> None:
    """UserError when the batch does not divide by the number of devices."""
    if batch_size % len(devices):
        raise UserError(
            f"dataset.batch_size={batch_size} does not divide by {len(devices)} devices; change it or set num_devices"
        )


def axis_name(devices: Sequence[jax.Device]) -> str | None:
    """The name networks and steps reduce over, or None on one device."""
    return AXIS if len(devices) > 1 else None


def all_devices() -> list[jax.Device]:
    """Of all processes. UserError where jax cannot start."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"jax cannot start with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: unset it, and "
            f"for NVIDIA GPUs pip install -r requirements.txt. {error}"
        ) from error


def check_platform(devices: Sequence[jax.Device], platform: str, key: str) -> None:
    """UserError unless the devices are of `platform` ("": of any), which the key or flag asks for."""
    if platform and {device.platform for device in devices} != {platform}:
        kinds = collections.Counter(f"{device.platform} ({device.device_kind})" for device in devices)
        raise UserError(
            f"{key}={platform}, but jax uses {', '.join(f'{n} x {kind}' for kind, n in kinds.items())}: "
            f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}; for NVIDIA GPUs unset it, pip "
            f"install -r requirements.txt and see that nvidia-smi lists them; or change {key}"
        )


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """A copy of every leaf on every device, placed once. Copied, so that a donated result never deletes its source."""
    return jax.device_put(jax.tree.map(jnp.copy, tree), _sharding(devices, PartitionSpec()))


def share(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Every leaf on every device, copied to those only that have it not. Never donate what comes of it."""
    return jax.device_put(tree, _sharding(devices, PartitionSpec()))


def spread(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Examples, leaves [N, ...], on the devices: whole on one, else in parts [D, n, ...], the last one padded.

    Here and in `place_steps` a host reads and holds the parts of its own devices only.
    """
    places = _places_here(devices)

    def parts(leaf):
        size = -(-len(leaf) // len(devices))
        first, padded = places.start * size, _empty((places.stop - places.start) * size, leaf)
        for start in range(0, len(padded), 4096):  # a whole copy of selected images would take as much once more
            part = leaf[first + start : first + start + min(4096, len(padded) - start)]
            padded[start : start + len(part)] = part
            padded[start + len(part) : start + 4096] = 0
        return padded if len(devices) == 1 else padded.reshape(-1, size, *leaf.shape[1:])

    parts_of_all = jax.tree.map(parts, tree)
    return jax.device_put(parts_of_all, devices[0]) if len(devices) == 1 else _over_devices(parts_of_all, devices)


def _empty(length: int, like: np.ndarray) -> np.ndarray:
    """An array [length, ...] that begins at a multiple of 64 bytes: a CPU device takes it over without a copy."""
    size = length * int(np.prod(like.shape[1:])) * like.dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(like.dtype).reshape(length, *like.shape[1:])


def place_steps(leaves: Any, rows: np.ndarray, devices: Sequence[jax.Device]) -> Any:
    """The examples `rows` [S, B] of host leaves [N, ...] on the devices: [S, B, ...], or [D, S, B / D, ...].

    Rows beyond N - 1 stand for no example; they get the last one's values.
    """
    if len(devices) > 1:
        rows = rows.reshape(len(rows), len(devices), -1).swapaxes(0, 1)[_places_here(devices)]
    chosen = jax.tree.map(lambda leaf: leaf[np.minimum(rows, len(leaf) - 1)], leaves)
    return jax.device_put(chosen, devices[0]) if len(devices) == 1 else _over_devices(chosen, devices)


def _over_devices(tree: Any, devices: Sequence[jax.Device]) -> Any:
    return jax.device_put(tree, _sharding(devices, PartitionSpec(AXIS)))


def _sharding(devices: Sequence[jax.Device], spec: PartitionSpec) -> NamedSharding:
    """Over this host's devices, as pmap has it."""
    return NamedSharding(Mesh(np.array(devices[_places_here(devices)]), (AXIS,)), spec)
