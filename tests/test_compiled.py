"""Devices: choosing and replicating; what compiled steps may donate and must reduce; how precisely they multiply."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from asib_jax.engine import compiled as compiled_, devices as devices_
from asib_jax.objectives import losses

DEVICES = devices_.run_devices(4)


def test_device_counts():
    assert [len(devices_.run_devices(count)) for count in (1, 2, 0)] == [1, 2, len(jax.local_devices())]
    for count in (-1, 99):
        with pytest.raises(ValueError, match=f"num_devices={count}, but 4 are here"):
            devices_.run_devices(count)
    assert devices_.axis_name(DEVICES[:1]) is None and devices_.axis_name(DEVICES[:2]) == devices_.AXIS


def test_batch_must_divide():
    devices_.check_batch(8, DEVICES)
    with pytest.raises(ValueError, match="dataset.batch_size=6 does not divide by 4 devices; .*num_devices"):
        devices_.check_batch(6, DEVICES)


@pytest.mark.parametrize("count", [1, 4])
def test_steps_get_their_share_and_reduce_to_one_result(count):
    """State without a device axis in and out; the global mean by hand; a donated copy leaves its source alone."""
    devices = DEVICES[:count]
    mean = losses.batch_mean(devices_.axis_name(devices))

    def step(state, offset, controls, batch):
        return jax.tree.map(lambda x: x + offset, state), {
            "mean": mean(batch["x"] ** 2),
            "size": jnp.int32(len(batch["x"])),
        }

    compiled = compiled_.compile_steps(step, devices, donate_carry=True)
    source = {"w": jnp.arange(3.0)}
    state = first = devices_.replicate(source, devices)
    x = np.arange(8.0, dtype=np.float32)
    resident = devices_.spread({"x": x}, devices)
    for rows in (np.arange(8), np.arange(8)[::-1]):
        state, metrics = compiled(state, np.float32(0.5), {}, resident, {}, np.int32(rows)[None], {}).tree
    np.testing.assert_array_equal(state["w"], [1, 2, 3])
    np.testing.assert_array_equal(source["w"], [0, 1, 2])
    assert first["w"].is_deleted() and not source["w"].is_deleted()
    np.testing.assert_allclose(metrics["mean"], [np.mean(x**2)], rtol=1e-6)
    np.testing.assert_array_equal(metrics["size"], [8 // count])
    assert len(state["w"].sharding.device_set) == count


def test_steps_of_one_call():
    """What is asked for, but for 32 on simulated devices; else 32, or 1 where a CPU would train convolutions."""
    one, four = DEVICES[:1], DEVICES
    for devices in (one, four):
        assert compiled_.steps_per_call(0, devices, trains_convolutions=True) == 1
        assert compiled_.steps_per_call(0, devices, trains_convolutions=False) == 32
        assert compiled_.steps_per_call(5, devices, trains_convolutions=True) == 5
    assert compiled_.steps_per_call(100, one, trains_convolutions=False) == 100
    assert compiled_.steps_per_call(100, four, trains_convolutions=False) == 32


def test_float32_products_are_float32_whoever_imports_the_library():
    """jax's own default leaves them to the device, TF32 on GPUs; what the library compiles asks for all digits, in one
    step and in a loop, forwards and backwards."""

    def step(carry, fixed, controls, batch):
        def loss(w):
            return jnp.sum(jax.lax.conv(batch["x"], w, (1, 1), "SAME").reshape(-1, 4) @ jnp.eye(4))

        return carry - jax.grad(loss)(carry), {}

    compiled = compiled_.compile_steps(step, DEVICES[:1])
    assert jax.config.jax_default_matmul_precision is None
    x = np.zeros((8, 2, 4, 4), np.float32)
    for rows in (np.zeros((1, 4), np.int32), np.zeros((3, 4), np.int32)):
        text = compiled.lower(np.ones((2, 2, 3, 3), np.float32), {}, {}, {"x": x}, {}, rows, {}).as_text()
        products = [line for line in text.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
        assert products and all("HIGHEST" in line for line in products), products


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
    compiled_.keep_compiled("~/new/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # here 0.3 s would keep nothing
    assert int(jax.jit(lambda x: x + 41)(1)) == 42
    assert [path.name.split("-")[0] for path in (tmp_path / "new" / "xla").glob("*-cache")] == ["jit__lambda"]


def test_no_folder_and_the_environments_own(compiler, monkeypatch, tmp_path):
    compiled_.keep_compiled("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "another")
    compiled_.keep_compiled(str(tmp_path / "xla"))
    assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_warning(compiler, caplog, monkeypatch, tmp_path):
    """Below a file; and below a home that does not exist."""
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    (tmp_path / "file").touch()
    compiled_.keep_compiled(str(tmp_path / "file" / "xla"))
    compiled_.keep_compiled("~nobody-of-this-name/xla")
    assert ["compilation_cache=" in message for message in caplog.messages] == [True, True]
    assert "file/xla" in caplog.messages[0] and jax.config.jax_compilation_cache_dir is None
    assert int(jax.jit(lambda x: x + 41)(1)) == 42


@pytest.mark.parametrize("count", [1, 4])
def test_programs_do_not_hold_the_names_of_what_they_train(count):
    """Networks that are alike but for their names share one, where compiled programs are kept."""
    devices = DEVICES[:count]
    rows, resident = np.arange(8, dtype=np.int32)[None], devices_.spread({"x": np.zeros(8, np.float32)}, devices)

    def text(name):
        def step(state, *_):
            return jax.tree.map(lambda x: x + 1, state), {"loss": jnp.float32(0)}

        compiled = compiled_.compile_steps(step, devices)
        return compiled.lower({name: {"w": np.zeros(3, np.float32)}}, {}, {}, resident, {}, rows, {}).as_text()

    assert text("teacher1_fold1") == text("teacher1_fold2")
