"""`deterministic`: XLA is told before it starts, or it is an error; two runs leave the same bits."""

import os
import subprocess
import sys

import jax
import numpy as np
from launching import ROOT, launch_process

from asib_jax.weights import checkpoint

FLAG = "--xla_gpu_deterministic_ops"


def python(*arguments, flags=""):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # XLA tells nothing of what is not compiled
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_xla_takes_the_flag_beside_those_given(tmp_path):
    """As it writes down itself with what it compiles; its last word on a flag counts."""
    script = (
        "import os, jax\nfrom asib_jax.engine import compiled\ncompiled.be_deterministic()\n"
        "print(jax.jit(lambda x: x + 1)(1), os.environ['XLA_FLAGS'])"
    )
    done = python("-c", script, flags=f"--xla_dump_to={tmp_path} {FLAG}=false")
    assert done.stdout == f"2 --xla_dump_to={tmp_path} {FLAG}=false {FLAG}=true\n", done.stderr
    written = [path.read_text() for path in tmp_path.glob("*debug_options*")]
    assert written and all("xla_gpu_deterministic_ops: true" in text for text in written)


def test_once_a_device_was_used_it_is_too_late():
    script = "import jax\njax.devices()\nfrom asib_jax.engine import compiled\ncompiled.be_deterministic()"
    done = python("-c", script)
    assert done.returncode == 1 and "asib_jax.errors.UserError: deterministic=True comes too late" in done.stderr
    assert python("-c", script, flags=f"{FLAG}=true").returncode == 0


def test_two_runs_leave_the_same_bits(tmp_path):
    """Seeds and order alone: XLA's flag is about GPUs, and on CPUs nothing would differ without it either."""
    left = []
    for name in ("one", "two"):
        done = launch_process(
            ROOT / "tests" / "one_host",
            "1",
            f"--config={ROOT}/configs/ce_only.py:digits",
            "--config.deterministic=True",
            "--config.model.student.name=tiny_scratch",
            f"--config.results_dir={tmp_path}",
            f"--config.exp_id={name}",
            "--config.train_control=False",
            "--config.student_epochs_per_stage=(1,1)",
            "--config.schedule.lr_warmup_epochs=1",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        left.append(checkpoint.restore(tmp_path / name / "checkpoints" / "final"))
    assert len(jax.tree.leaves(left[0])) > 5
    jax.tree.map(np.testing.assert_array_equal, *left)
