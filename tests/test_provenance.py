"""What a run's record says of its origin, against the sources themselves; git that is absent, broken or slow."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time

import flax
import jax
import numpy as np
import optax
import pytest
from networks import make_split

from asib_jax import recipe
from asib_jax.data.parts import Data
from asib_jax.engine import devices
from asib_jax.record import provenance
from configs import l1_ib


def test_the_record_is_plain_and_true():
    config = l1_ib.get_config("digits")
    config.seed = 3
    teacher_train, validation, test = make_split(20), make_split(10, seed=1), make_split(7, seed=2)
    rows = np.array([3, 1, 2])
    data = Data(teacher_train.take(rows), teacher_train, validation, test, tuple("abcde"), "noise")
    about = provenance.describe(recipe.read(config), data, devices.run_devices(2))
    assert json.loads(json.dumps(about)) == about

    def sha(split, rows=slice(None)):
        return hashlib.sha256(split.image[rows].tobytes() + split.label[rows].tobytes()).hexdigest()

    assert about["data_sha256"] == {
        "train": sha(teacher_train, rows),
        "teacher_train": sha(teacher_train),
        "validation": sha(validation),
        "test": sha(test),
    }
    assert about["seed"] == 3 and about["data"] == "noise"
    expected = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
    }
    assert expected.items() <= about["versions"].items() and {"jaxlib", "orbax-checkpoint"} <= about["versions"].keys()
    assert (about["device_kind"], about["devices"], about["hosts"]) == ("cpu", 2, 1)
    assert (about["compute_dtype"], about["matmul_precision"]) == ("float32", "highest")
    assert about["deterministic"] is False and about["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert about["jax_enable_x64"] is False
    jax.config.update("jax_enable_x64", True)
    try:
        wide = provenance.describe(recipe.read(config), data, devices.run_devices(2))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert wide["jax_enable_x64"] is True
    whole = provenance.describe(recipe.read(config), data._replace(train=teacher_train), devices.run_devices(1))
    assert whole["data_sha256"]["train"] == sha(teacher_train) and whole["devices"] == 1


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(("git", *identity, *arguments), cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "code"
    (folder / "asib_jax").mkdir(parents=True)
    (folder / "asib_jax" / "steps.py").write_text("1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@needs_git
def test_the_revision_and_whether_code_was_changed_since(repository):
    head = git(repository, "rev-parse", "HEAD").strip()
    assert len(head) == 40 and provenance.git_state(repository) == (head, False)
    (repository / "results").mkdir()
    (repository / "results" / "log.txt").write_text("no code")
    assert provenance.git_state(repository) == (head, False)
    (repository / "configs").mkdir()
    (repository / "configs" / "mine.py").write_text("an experiment that git does not know")
    assert provenance.git_state(repository) == (head, True)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "second")
    assert provenance.git_state(repository)[1] is False
    (repository / "asib_jax" / "steps.py").write_text("2\n")
    assert provenance.git_state(repository)[1] is True


@needs_git
def test_a_folder_in_somebody_elses_repository_has_no_revision(repository):
    assert provenance.git_state(repository / "asib_jax") == ("", None)


@needs_git
def test_git_that_is_broken_absent_or_slow_costs_nothing_but_the_revision(repository, monkeypatch, tmp_path):
    (repository / ".git" / "HEAD").write_text("nonsense")
    assert provenance.git_state(repository) == ("", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(repository) == ("", None)
    (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    start = time.monotonic()
    assert provenance.git_state(repository, timeout=0.2) == ("", None)
    assert time.monotonic() - start < 10
