"""The check of a machine's devices, on four simulated ones and on made-up findings."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from asib_jax.tools import device_check
from asib_jax.tools.device_check import Matmul

DEVICES = jax.devices()


def test_the_all_reduce_is_exact():
    sums = device_check.all_reduce()
    np.testing.assert_array_equal(sums, [1 + 2 + 3 + 4] * 4)
    device_check.check_sums(sums, 4)


@pytest.mark.parametrize("sums", [[10, 10, 9, 10], [4, 4, 4, 4]])
def test_a_wrong_sum_is_an_error(sums):
    with pytest.raises(ValueError, match=rf"gives \[{sums[0]}, .*, not 10 on each local device.*NCCL_DEBUG"):
        device_check.check_sums(sums, 4)


def test_expectations():
    for expected, platform in ((1, ""), (4, "cpu")):
        device_check.check_devices(DEVICES, expected, platform)
    with pytest.raises(ValueError, match=r"--expect=5, but jax sees 4 \(cpu\): .*CUDA_VISIBLE_DEVICES"):
        device_check.check_devices(DEVICES, 5, "cpu")
    with pytest.raises(
        ValueError, match=r"--platform=gpu, but jax uses 4 x cpu \(cpu\): .*JAX_PLATFORMS.*requirements.txt"
    ):
        device_check.check_devices(DEVICES, 1, "gpu")


def test_every_process_must_have_as_many_devices():
    """pmap cannot run otherwise: a host with a dead GPU among whole ones."""
    devices = [SimpleNamespace(platform="gpu", process_index=k) for k in (0, 0, 1, 1, 1)]
    device_check.check_devices(devices[:4], 4, "gpu")
    with pytest.raises(ValueError, match=r"the processes have \[2, 3\] devices"):
        device_check.check_devices(devices, 4, "gpu")


def test_operations_of_a_product():
    """Counted by XLA, too; each of size * size entries takes size multiplications and as many additions."""
    square = jax.ShapeDtypeStruct((96, 96), np.float32)
    counted = jax.jit(jax.numpy.matmul).lower(square, square).cost_analysis()["flops"]
    assert device_check.matmul_flops(96) == counted == 96 * 96 * 2 * 96


def test_products_are_right_and_take_time():
    """The rate, whatever it is, is of `matmul_flops`: at 96 x 96 below 100 TFLOP/s anywhere."""
    measured = device_check.matmuls(DEVICES, 96)
    assert len(measured) == 4
    for device, matmul in zip(DEVICES, measured):
        assert 0 < matmul.rate < 100 and 0 <= matmul.error < 1e-5
        device_check.check_matmul(device, matmul)


def test_one_wrong_entry_is_seen():
    """Of 16 rows with 64 entries, whose standard deviation is 8."""
    reference = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    result = reference.copy()
    result[3, 5] += 0.4
    assert device_check.largest_error(result, reference) == pytest.approx(0.4 / 8, rel=1e-5)
    result[3, 5] = np.nan
    assert np.isnan(device_check.largest_error(result, reference))


@pytest.mark.parametrize("error", [1.01e-3, float("nan")])
def test_a_wrong_product_is_an_error(error):
    with pytest.raises(ValueError, match="device 2 multiplies wrongly: .*CUDA_VISIBLE_DEVICES"):
        device_check.check_matmul(DEVICES[2], Matmul(1.0, error))


def test_slow_devices():
    assert device_check.slow([10.0, 4.9, 4.7, 10.5, 9.5]) == [2]  # the median is 9.5
