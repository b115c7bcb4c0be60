"""Devices: choosing and replicating, and what compiled steps may donate and must reduce."""
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from asib_jax.engine import parallel

DEVICES = parallel.run_devices(4)


def test_device_counts():
    assert [len(parallel.run_devices(count)) for count in (1, 2, 0)] == [1, 2, len(jax.local_devices())]
    for count in (-1, 99):
        with pytest.raises(ValueError, match=f"num_devices={count}, but 4 are here"):
            parallel.run_devices(count)
    assert parallel.axis_name(DEVICES[:1]) is None and parallel.axis_name(DEVICES[:2]) == parallel.AXIS


def test_batch_must_divide():
    parallel.check_batch(8, DEVICES)
    with pytest.raises(ValueError, match="dataset.batch_size=6 does not divide by 4 devices; .*num_devices"):
        parallel.check_batch(6, DEVICES)


@pytest.mark.parametrize("count", [1, 4])
def test_steps_get_their_share_and_reduce_to_one_result(count):
    """State without a device axis in and out; the global mean by hand; a donated copy leaves its source alone."""
    devices = DEVICES[:count]
    mean = parallel.batch_mean(parallel.axis_name(devices))

    def step(state, offset, controls, batch):
        return jax.tree.map(lambda x: x + offset, state), {"mean": mean(batch["x"] ** 2),
                                                           "size": jnp.int32(len(batch["x"]))}

    compiled = parallel.compile_steps(step, devices, donate_carry=True)
    source = {"w": jnp.arange(3.0)}
    state = first = parallel.replicate(source, devices)
    x = np.arange(8.0, dtype=np.float32)
    resident = parallel.spread({"x": x}, devices)
    for rows in (np.arange(8), np.arange(8)[::-1]):
        state, metrics = compiled(state, np.float32(0.5), {}, resident, {}, np.int32(rows)[None], {}, np.int32(1))
    np.testing.assert_array_equal(state["w"], [1, 2, 3])
    np.testing.assert_array_equal(source["w"], [0, 1, 2])
    assert first["w"].is_deleted() and not source["w"].is_deleted()
    np.testing.assert_allclose(metrics["mean"], [np.mean(x ** 2)], rtol=1e-6)
    np.testing.assert_array_equal(metrics["size"], [8 // count])
    assert len(state["w"].sharding.device_set) == count


def test_steps_of_one_call():
    """What is asked for, but for 32 on simulated devices; else 32, or 1 where a CPU would train convolutions."""
    one, four = DEVICES[:1], DEVICES
    for devices in (one, four):
        assert parallel.steps_per_call(0, devices, trains_convolutions=True) == 1
        assert parallel.steps_per_call(0, devices, trains_convolutions=False) == 32
        assert parallel.steps_per_call(5, devices, trains_convolutions=True) == 5
    assert parallel.steps_per_call(100, one, trains_convolutions=False) == 100
    assert parallel.steps_per_call(100, four, trains_convolutions=False) == 32


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
