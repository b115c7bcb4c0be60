"""`launch/main.py` with tiny networks: one_host.py LOCAL_DEVICES [FLAGS]; a process of `test_hosts` and `test_kill`."""

import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax
from networks import convolutions

from asib_jax.models import MODELS

jax.config.update("jax_num_cpu_devices", int(sys.argv.pop(1)))
jax.config.update("jax_disable_most_optimizations", True)  # compilation is the cost
MODELS |= {"tiny": lambda small_input: convolutions(3), "tiny_teacher": lambda small_input: convolutions(4)}
runpy.run_path(str(ROOT / "launch" / "main.py"), run_name="__main__")
