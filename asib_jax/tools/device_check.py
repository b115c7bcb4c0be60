"""Whether the devices are those a run expects, and compute and communicate as they should."""

import collections
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax.engine.compiled import PRECISION
from asib_jax.engine.devices import AXIS, all_devices, check_platform
from asib_jax.errors import UserError

TOLERANCE = 1e-3  # of a product's entries, in their standard deviation; float32 sums of 2048 terms are within 1e-5
_REPETITIONS = 10
_ROWS = 64  # of a product that are compared, evenly spaced


class Matmul(NamedTuple):
    """rate: TFLOP/s; error: the largest of the entries compared, in their standard deviation."""

    rate: float
    error: float


def describe(device: jax.Device) -> str:
    """One line: id, kind, process and, of a local device that tells it, memory."""
    stats = device.memory_stats() if device.process_index == jax.process_index() else None
    return f"device {device.id}: {device.device_kind}, process {device.process_index}{memory(stats)}"


def memory(stats: dict[str, Any] | None) -> str:
    """What `device.memory_stats()` says of the memory that jax may take, as the end of a line."""
    if not stats or not {"bytes_in_use", "bytes_limit"} <= stats.keys():  # CPUs, and some of jax's allocators
        return ""
    return f", {stats['bytes_in_use'] / 2**30:.2f} of {stats['bytes_limit'] / 2**30:.2f} GiB in use"


def check_devices(devices: Sequence[jax.Device], expected: int, platform: str) -> None:
    """UserError unless there are `expected` devices or more, as many in each process, of `platform` ("": of any)."""
    check_platform(devices, platform, "--platform")
    if len(devices) < expected:
        raise UserError(
            f"--expect={expected}, but jax sees {len(devices)} ({devices[0].platform}): see what "
            "nvidia-smi lists, unset CUDA_VISIBLE_DEVICES, start every host's process, or lower --expect"
        )
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:  # pmap's condition
        raise UserError(
            f"the processes have {[counts[k] for k in sorted(counts)]} devices: give each as many, with "
            "CUDA_VISIBLE_DEVICES"
        )


def all_reduce() -> np.ndarray:
    """The sum, on each local device, over the devices of all processes of each one's place among them, from 1."""
    everywhere = all_devices()
    places = np.array([everywhere.index(device) + 1 for device in jax.local_devices()], np.int32)
    sums = jax.pmap(lambda place: jax.lax.psum(place, AXIS), AXIS)(places)
    return np.concatenate([np.ravel(shard.data) for shard in sums.addressable_shards])


def check_sums(sums: Sequence[int] | np.ndarray, count: int) -> None:
    """UserError unless each sum is 1 + 2 + ... + count."""
    right = count * (count + 1) // 2
    if any(found != right for found in sums):
        raise UserError(
            f"the all-reduce gives {[int(found) for found in sums]}, not {right} on each local device: "
            "the links between the devices are at fault; set NCCL_DEBUG=INFO to see which, "
            "NCCL_P2P_DISABLE=1 to do without the direct ones"
        )


def matmul_size(platform: str) -> int:
    """Of the matrices: on two CPU cores all products take about a second, on a GPU one takes milliseconds."""
    return 1536 if platform == "cpu" else 8192


def matmul_flops(size: int) -> int:
    """Operations of a product of two square matrices; a multiply-add is 2."""
    return 2 * size**3


def matmuls(devices: Sequence[jax.Device], size: int, dtype: str = "bfloat16") -> list[Matmul]:
    """The product of two matrices [size, size] of that type, summed in float32, on one device after the other.

    The reference is numpy's float32 product of the same entries. These are drawn from N(0, 1), which gives an entry of
    the product the standard deviation sqrt(size).
    """
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((size, size), np.float32).astype(jnp.dtype(dtype)) for _ in range(2))
    rows = np.linspace(0, size - 1, _ROWS, dtype=int)
    reference = a[rows].astype(np.float32) @ b.astype(np.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=PRECISION, preferred_element_type=jnp.float32))
    measured = []
    for device in devices:
        inputs = jax.device_put((a, b), device)
        jax.block_until_ready([product(*inputs) for _ in range(2)])  # compiles, and wakes the device up
        start = time.perf_counter()
        results = jax.block_until_ready([product(*inputs) for _ in range(_REPETITIONS)])
        rate = _REPETITIONS * matmul_flops(size) / (time.perf_counter() - start) / 1e12
        measured.append(Matmul(rate, largest_error(np.array(results[-1])[rows], reference)))
    return measured


def largest_error(rows: np.ndarray, reference: np.ndarray) -> float:
    """Between rows [n, size] of two products, in the standard deviation of their entries; NaN if any is."""
    return float(np.max(np.abs(rows - reference)) / math.sqrt(rows.shape[1]))


def check_matmul(device: jax.Device, matmul: Matmul) -> None:
    """UserError if the device multiplies wrongly; NaN is wrong."""
    if not matmul.error <= TOLERANCE:
        raise UserError(
            f"device {device.id} multiplies wrongly: entries are off by up to {matmul.error:.2g} standard "
            f"deviations, where {TOLERANCE:g} is allowed; leave it out with CUDA_VISIBLE_DEVICES"
        )


def slow(rates: Sequence[float]) -> list[int]:
    """Which of the rates are less than half of their median."""
    return [i for i, rate in enumerate(rates) if rate < statistics.median(rates) / 2]
