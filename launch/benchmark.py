"""Measure a run's speed: python launch/benchmark.py --config=configs/l2_cccp.py [--synthetic] [--config.KEY=VALUE ...]

--synthetic needs neither data nor weights. --vs_torch times the same steps in PyTorch, in turn with ours; it needs
torch and, for ConvNeXt, timm.
"""

import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags
from ml_collections import config_flags

from asib_jax import preparation
from asib_jax.engine import compiled, devices
from asib_jax.errors import UserError
from asib_jax.recipe import Recipe, checks, read
from asib_jax.tools import benchmark, benchmark_report, command_line, workloads

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
SYNTHETIC = flags.DEFINE_boolean("synthetic", False, "Random images of the data set's size and random weights.")
VS_TORCH = flags.DEFINE_boolean("vs_torch", False, "Measure tests/torch_asib.py, too.")
SECONDS = flags.DEFINE_float(
    "seconds", 10.0, "For all rounds of a measurement; a round is a call at least.", lower_bound=0.0
)
JSON = flags.DEFINE_string("json", "", "A file for everything measured.")


def main() -> None:
    if VS_TORCH.value:  # or jax takes three quarters of a GPU, and PyTorch has to do with the rest
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    logging.getLogger("asib_jax.benchmark").setLevel(logging.INFO)  # its progress alone
    path, _, profile = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    recipe = read(CONFIG.value)
    recipe = workloads.synthetic(recipe) if SYNTHETIC.value else recipe
    checks.check(recipe)
    preparation.check_machine(recipe)
    out = pathlib.Path(JSON.value)
    if not math.isfinite(SECONDS.value):
        raise UserError(f"--seconds={SECONDS.value} must be finite")
    if JSON.value and not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise UserError(f"--json={JSON.value}: {out.parent} is no folder that can be written")
    rival = vs_torch(recipe) if VS_TORCH.value else None
    compiled.keep_compiled(recipe.compilation_cache)
    report = benchmark.measure(recipe, random=SYNTHETIC.value, seconds=SECONDS.value, rival=rival)
    report["config"] = ":".join(filter(None, (pathlib.Path(path).stem, profile)))
    print(benchmark_report.text(report))
    if JSON.value:
        out.write_text(json.dumps(report, indent=2) + "\n")


def vs_torch(recipe: Recipe) -> Callable:
    """The PyTorch side, which is no part of the library. UserError without PyTorch, or for what it cannot do."""
    if not (ROOT / "tests" / "torch_benchmark.py").exists():
        raise UserError("--vs_torch needs a checkout of asib_jax: what it compares with is among the tests")
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import torch_benchmark
    except ModuleNotFoundError as error:
        raise UserError(f"--vs_torch needs PyTorch ({error}): pip install torch") from error
    torch_benchmark.check(recipe, len(devices.run_devices(recipe.num_devices)))
    return torch_benchmark.works


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
