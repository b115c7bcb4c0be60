"""What a run's numbers come from: its data, code, packages, devices and precision, as plain values for its record."""
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from asib_jax.tools import device_check
from asib_jax.build import Data
from asib_jax.recipe.recipe import Recipe
from asib_jax.weights.teacher_store import images_digest

ROOT = pathlib.Path(__file__).resolve().parents[2]
_CODE = ("asib_jax", "configs", "launch")


def describe(recipe: Recipe, data: Data, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """JSON-able values that, with the configuration, say what the run computes on which `devices`.

    "data_sha256": see `data_digests`; "revision" and "uncommitted_changes" are of the git repository that the package
    lies in, "" and None where there is none.
    """
    revision, changed = git_state(ROOT)
    return {
        "seed": recipe.seed, "data": data.origin, "data_sha256": data_digests(data),
        "revision": revision, "uncommitted_changes": changed,
        "versions": {**device_check.versions(), "numpy": np.__version__},
        "device_kind": devices[0].device_kind, "devices": len(devices), "hosts": jax.process_count(),
        "backend": " ".join(devices[0].client.platform_version.split()),  # of GPUs, with CUDA's version
        "compute_dtype": recipe.compute_dtype, "matmul_precision": jax.config.jax_default_matmul_precision,
        "deterministic": recipe.deterministic, "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def data_digests(data: Data) -> dict[str, str]:
    """SHA-256 of each split's images and labels, in their order, in hexadecimal."""
    digests = {name: images_digest(getattr(data, name)) for name in ("teacher_train", "validation", "test")}
    whole = len(data.train.label) == len(data.teacher_train.label)
    digests["train"] = digests["teacher_train"] if whole else images_digest(data.train)
    return digests


def git_state(root: pathlib.Path, timeout: float = 5.0) -> tuple[str, bool | None]:
    """The revision of the git repository at `root`, and whether its code differs from it; ("", None) for no repository,
    no git, or one that does not answer within `timeout` seconds."""
    if not (root / ".git").exists():  # git would look for one further up
        return "", None
    try:
        revision = _git(root, timeout, "rev-parse", "HEAD")
        return revision, bool(_git(root, timeout, "status", "--porcelain", "--", *_CODE))
    except (OSError, subprocess.SubprocessError):
        return "", None


def _git(root: pathlib.Path, timeout: float, *arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=root, timeout=timeout, check=True, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    return done.stdout.strip()
