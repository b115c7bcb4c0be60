"""Check this machine's devices before a long run: python launch/check_devices.py [--expect=8] [--platform=gpu]

With several hosts, on each: --coordinator=HOST:PORT --processes=2 --process=0, and 1 on the other.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from absl import flags

from asib_jax.engine import devices as devices_
from asib_jax.record import provenance
from asib_jax.tools import command_line, device_check

EXPECT = flags.DEFINE_integer("expect", 1, "The least number of devices, over all processes.", lower_bound=1)
PLATFORM = flags.DEFINE_string("platform", "", "What the devices must be, e.g. gpu.")
JOINED = command_line.host_flags()


def check() -> None:
    """Print what there is and how fast it is; raises at the first thing that is wrong."""
    print(*(f"{name} {version}" for name, version in provenance.versions().items()), sep=", ")
    devices, local = devices_.all_devices(), jax.local_devices()
    print(f"backend {jax.default_backend()}, devices: {len(devices)}, in this process {len(local)}")
    print(*map(device_check.describe, devices), sep="\n")
    device_check.check_devices(devices, EXPECT.value, PLATFORM.value)
    print("all-reduce over all devices", flush=True)  # the last thing seen where it hangs
    sums = device_check.all_reduce()
    device_check.check_sums(sums, len(devices))
    print(f"its sum is {sums[0]}, as it should be")
    size = device_check.matmul_size(local[0].platform)
    print(f"bfloat16 matrix products, {size} x {size}:", flush=True)
    measured = device_check.matmuls(local, size)
    for device, matmul in zip(local, measured):
        print(f"device {device.id}: {matmul.rate:.3g} TFLOP/s, largest error {matmul.error:.1g}")
    for device, matmul in zip(local, measured):
        device_check.check_matmul(device, matmul)
    for i in device_check.slow([matmul.rate for matmul in measured]):
        print(
            f"warning: device {local[i].id} has less than half of the median rate: see with nvidia-smi what else "
            "runs on it, its clocks and its temperature"
        )


def main() -> None:
    with JOINED():
        check()
    print("no fault found")


if __name__ == "__main__":
    command_line.run(main)
