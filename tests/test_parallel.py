"""Devices: choosing, replicating, sharding, and what a compiled step may donate and must reduce."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
