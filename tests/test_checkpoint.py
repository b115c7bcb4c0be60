"""Checkpoints: bitwise round trips through real files, and what happens to missing and damaged ones."""

import errno
import hashlib
import os
import pathlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from disk import longest_file
from flax import serialization

from asib_jax.errors import UserError
from asib_jax.weights import checkpoint


def make_state():
    params = {"student": {"fc": {"kernel": jnp.linspace(0, 1, 6).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}}}
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1))
    _, opt_state = tx.update(params, tx.init(params), params)
    return {"params": params, "batch_stats": {"student": {}}, "opt_state": opt_state, "step": jnp.int32(7)}


def test_round_trip_is_bitwise_and_fits_back_into_the_optimiser_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state()
    checkpoint.save("runs/last", state)  # relative, with a parent that does not exist yet
    restored = checkpoint.restore(tmp_path / "runs" / "last")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert restored["params"]["student"]["fc"]["bias"].dtype == jnp.bfloat16
    back = serialization.from_state_dict(state, restored)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_saving_again_replaces(tmp_path):
    checkpoint.save(tmp_path / "best", {"w": jnp.ones(3)}, "first")
    checkpoint.save(tmp_path / "best", {"w": jnp.zeros(3)}, "second")
    restored, text = checkpoint.restore_with_text(tmp_path / "best")
    np.testing.assert_array_equal(restored["w"], np.zeros(3))
    assert text == "second"


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint .*nowhere"):
        checkpoint.restore(tmp_path / "nowhere")


def test_digest_is_the_one_stored_and_only_ours_have_it(tmp_path):
    """Against the definition: the SHA-256 of the one leaf's path, type, shape and bytes."""
    values = np.float32([[1, 2]])
    checkpoint.save(tmp_path / "ours", {"fc": {"bias": values}})
    expected = hashlib.sha256(b"('fc', 'bias') float32 (1, 2)" + values.tobytes()).hexdigest()
    assert checkpoint.digest(tmp_path / "ours") == expected
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", {"w": values})
    for read in (checkpoint.digest, checkpoint.restore):
        with pytest.raises(UserError, match="foreign is not a checkpoint by asib_jax"):
            read(tmp_path / "foreign")
    with pytest.raises(UserError, match="there is no checkpoint .*nowhere"):
        checkpoint.digest(tmp_path / "nowhere")


def test_unsaved_leaf_leaves_nothing_that_could_be_restored(tmp_path):
    with pytest.raises(ValueError, match="zero size"):
        checkpoint.save(tmp_path / "half", {"w": jnp.ones(3), "empty": jnp.zeros((0, 2))})
    with pytest.raises(UserError, match="there is no checkpoint .*half"):
        checkpoint.restore(tmp_path / "half")
    checkpoint.save(tmp_path / "half", {"w": jnp.ones(3)})
    np.testing.assert_array_equal(checkpoint.restore(tmp_path / "half")["w"], np.ones(3))


@pytest.mark.parametrize(
    "size, number",
    [(2**50, errno.ENOSPC), (2**16, errno.EFBIG)],
    ids=["a disk that has not so much", "a file that grows too long"],
)
def test_what_a_disk_does_not_take_is_named_and_leaves_nothing(tmp_path, size, number):
    values = np.random.default_rng(0).integers(0, 256, 2**16, dtype=np.uint8)
    with longest_file(2**12), pytest.raises(OSError) as caught:
        checkpoint.save(tmp_path / "run", {"w": np.broadcast_to(values, (size // values.size, values.size))})
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_read_is_neither_missing_nor_damaged():
    """A file of it, its folder, or one above: the snapshot before must not take its place."""
    with tempfile.TemporaryDirectory() as home:
        path = pathlib.Path(home) / "above" / "run"
        checkpoint.save(path, {"w": np.ones(3)})
        os.chmod(home, 0o755)
        for closed in (next(file for file in path.rglob("*") if file.is_file()), path, path.parent):
            closed.chmod(0)
            try:
                if os.getuid() == 0:  # for whom there is nothing that may not be read
                    os.seteuid(65534)
                for read in (checkpoint.restore, checkpoint.digest):
                    with pytest.raises(PermissionError, match=str(path.parent)):
                        read(path)
            finally:
                os.seteuid(os.getuid())
                closed.chmod(0o755)
        np.testing.assert_array_equal(checkpoint.restore(path)["w"], np.ones(3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of two leaves, incompressible, and its text."""
    path = tmp_path_factory.mktemp("whole") / "run"
    values = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    checkpoint.save(path, {"w": values, "b": np.arange(3)}, '{"epoch": 3}')
    return path


def every_file(path):
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("change", ["flipped", "cut", "missing", "empty"])
def test_whatever_happens_to_a_file_is_noticed(whole, tmp_path, change):
    """Every file of a checkpoint, one after the other: nothing but what was saved, or our error, comes back."""
    intact, noticed = checkpoint.restore(whole), 0
    for number, name in enumerate(every_file(whole)):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        content = bytearray((copy / name).read_bytes())
        if change == "flipped":
            content[len(content) // 2] ^= 1
        (copy / name).write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(change, content))
        if change == "missing":
            (copy / name).unlink()
        try:
            restored, text = checkpoint.restore_with_text(copy)
        except UserError:
            noticed += 1
            continue
        assert text == '{"epoch": 3}'  # a file that nothing depends on
        jax.tree.map(np.testing.assert_array_equal, restored, intact)
    assert noticed >= 2


def test_threads_do_not_disturb_each_other(tmp_path):
    """A run saves its student while a thread writes a snapshot."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: checkpoint.save(tmp_path / str(number), {"w": np.full(3, number)}), range(12)))
    for number in range(12):
        np.testing.assert_array_equal(checkpoint.restore(tmp_path / str(number))["w"], np.full(3, number))
