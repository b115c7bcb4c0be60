"""Devices: choosing, replicating, sharding, and what a compiled step may donate and must reduce."""
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from asib_jax import parallel

DEVICES = parallel.local_devices(4)


def test_device_counts():
    assert [len(parallel.local_devices(count)) for count in (1, 2, 0)] == [1, 2, len(jax.local_devices())]
    for count in (-1, 99):
        with pytest.raises(ValueError, match=f"num_devices={count}, but 4 are here"):
            parallel.local_devices(count)
    assert parallel.axis_name(DEVICES[:1]) is None and parallel.axis_name(DEVICES[:2]) == parallel.AXIS


def test_batch_must_divide():
    parallel.check_batch(8, DEVICES)
    with pytest.raises(ValueError, match="dataset.batch_size=6 does not divide by 4 devices; .*num_devices"):
        parallel.check_batch(6, DEVICES)


def test_shards_are_consecutive_and_one_device_gets_the_batch_itself():
    batch = {"image": np.arange(24).reshape(8, 3), "label": np.arange(8)}
    assert parallel.shard(batch, DEVICES[:1]) is batch
    shards = parallel.shard(batch, DEVICES[:2])
    assert shards["image"].shape == (2, 4, 3)
    np.testing.assert_array_equal(shards["label"], [[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize("count", [1, 4])
def test_step_gets_its_shard_and_reduces_to_one_result(count):
    """State without a device axis in and out; the global mean by hand; a donated copy leaves its source alone."""
    devices = DEVICES[:count]
    mean = parallel.batch_mean(parallel.axis_name(devices))

    def step(state, offset, batch):
        return jax.tree.map(lambda x: x + offset, state), {"mean": mean(batch ** 2), "size": jnp.int32(len(batch))}

    compiled = parallel.compile_step(step, devices, arguments=3, donate_first=True)
    source = {"w": jnp.arange(3.0)}
    state = first = parallel.replicate(source, devices)
    batch = np.arange(8.0, dtype=np.float32)
    for _ in range(2):
        state, metrics = compiled(state, np.float32(0.5), parallel.shard(batch, devices))
    np.testing.assert_array_equal(state["w"], [1, 2, 3])
    np.testing.assert_array_equal(source["w"], [0, 1, 2])
    assert first["w"].is_deleted() and not source["w"].is_deleted()
    np.testing.assert_allclose(metrics["mean"], np.mean(batch ** 2), rtol=1e-6)
    assert metrics["size"] == 8 // count
    assert len(state["w"].sharding.device_set) == count


@pytest.fixture
def compiler(monkeypatch):
    """What jax keeps of compiled programs, reset before and after; without the environment's say."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in settings]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(settings, before):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_the_folder(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parallel.keep_compiled("~/new/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # here 0.3 s would keep nothing
    assert int(jax.jit(lambda x: x + 41)(1)) == 42
    assert [path.name.split("-")[0] for path in (tmp_path / "new" / "xla").glob("*-cache")] == ["jit__lambda"]


def test_no_folder_and_the_environments_own(compiler, monkeypatch, tmp_path):
    parallel.keep_compiled("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "another")
    parallel.keep_compiled(str(tmp_path / "xla"))
    assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_warning(compiler, caplog, monkeypatch, tmp_path):
    """Below a file; and below a home that does not exist."""
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    (tmp_path / "file").touch()
    parallel.keep_compiled(str(tmp_path / "file" / "xla"))
    parallel.keep_compiled("~nobody-of-this-name/xla")
    assert ["compilation_cache=" in message for message in caplog.messages] == [True, True]
    assert "file/xla" in caplog.messages[0] and jax.config.jax_compilation_cache_dir is None
    assert int(jax.jit(lambda x: x + 41)(1)) == 42
