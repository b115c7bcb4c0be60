"""Signals in a process of their own: the first asks, the second ends."""

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = """
import signal, sys
from asib_jax.record.signals import Stop

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background

with Stop() as stop:
    assert stop.asked == ""
    for _ in range(int(sys.argv[2])):
        signal.raise_signal(int(sys.argv[1]))
        print(stop.asked, flush=True)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 2])
def test_the_first_asks_and_the_second_ends(number, times):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(int(number)), str(times)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"{number.name}\n" and f"{number.name}: stopping at the next training step" in done.stderr
    assert done.returncode == (0 if times == 1 else 128 + number)
