"""What a run's numbers come from: its data, code, packages, devices and precision, as plain values for its record."""

import importlib.metadata
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from asib_jax.data.parts import Data
from asib_jax.data.sources import images_digest
from asib_jax.engine.compiled import PRECISION
from asib_jax.errors import UserError
from asib_jax.recipe import Recipe, told_by_data
from asib_jax.record.experiment import Record

logger = logging.getLogger("asib_jax")

ROOT = pathlib.Path(__file__).resolve().parents[2]
_CODE = ("asib_jax", "configs", "launch")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def describe(recipe: Recipe, data: Data, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """JSON-able values that, with the configuration, say what the run of a complete recipe computes on which `devices`.

    "told_by_data": the values of the keys that a configuration may leave empty, see `recipe/told_by_data.py`;
    "data_sha256": see `data_digests`; "revision" and "uncommitted_changes" are of the git repository that the package
    lies in, "" and None where there is none.
    """
    revision, changed = git_state(ROOT)
    return {
        "seed": recipe.seed,
        "dataset": recipe.dataset.name,
        "student": "" if recipe.teachers_only else recipe.model.student.name,
        "teachers": " ".join(teacher.name for teacher in recipe.teachers) if recipe.uses_teachers else "",
        "data": data.origin,
        "data_sha256": data_digests(data),
        "told_by_data": told_by_data.values_of(recipe),
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "revision": revision,
        "uncommitted_changes": changed,
        "versions": {**versions(), "numpy": np.__version__},
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "hosts": jax.process_count(),
        "backend": " ".join(devices[0].client.platform_version.split()),  # of GPUs, with CUDA's version
        "compute_dtype": recipe.compute_dtype,
        "matmul_precision": PRECISION,
        "deterministic": recipe.deterministic,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax_enable_x64": bool(jax.config.values["jax_enable_x64"]),  # which changes what is drawn at random
    }


def note_changes(record: Record, now: dict[str, Any]) -> None:
    """Warn where a run goes on with other code, packages or devices, and keep in its record what they were before.

    Raises UserError for other data.
    """
    before = {key: record.about[key] for key in now if key in record.about}  # an earlier version told less
    changed = [key for key in before if before[key] != now[key] and key != "data"]  # which is a path
    if "data_sha256" in changed:
        raise UserError(
            f"{now['data']} is not the data that the run {record.folder} began with ({before['data']}): the "
            "SHA-256 of its splits differ"
        )
    if changed:
        logger.warning(
            "going on with another %s than before: bits may differ", ", ".join(key.replace("_", " ") for key in changed)
        )
        record.about["before"] = [*record.about.get("before", []), {key: before[key] for key in changed}]


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
    done = subprocess.run(
        ("git", *arguments),
        cwd=root,
        timeout=timeout,
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()
