"""Examples on their way to compiled steps: every step gets its own rows, in order, from wherever they lie."""
import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from asib_jax.engine import parallel
from asib_jax.engine.feed import on_host
from networks import make_feed

SIZE = 21  # not a multiple of any number of devices
GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.integers(0, 256, (SIZE, 2, 2, 3), dtype=np.uint8)
LABEL = GENERATOR.integers(0, 100, SIZE).astype(np.int32)
FEAT = GENERATOR.normal(size=(SIZE, 3)).astype(np.float32)
SHORT = FEAT.astype(ml_dtypes.bfloat16)
ROWS = np.concatenate([GENERATOR.permutation(SIZE)[:20], np.arange(SIZE)[-8:]]).reshape(7, 4)


def make_step(axis, traced=None):
    """Gives back the batch as the steps see it, whole; the carry counts them in a way that tells their order."""
    def step(carry, factor, controls, batch):
        if traced is not None:
            traced.append(True)
        whole = batch if axis is None else jax.lax.all_gather(batch, axis, tiled=True)
        return factor * carry + jnp.sum(whole["label"]) * controls["weight"], whole
    return step


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 3, 32])
@pytest.mark.parametrize("room_gb", [0, 1])
def test_every_step_gets_its_rows_in_order(devices, at_once, room_gb):
    """Bitwise, images, labels and features of two types, on the devices and on the host at once; traced once."""
    feed = make_feed(devices, steps=at_once, room_gb=room_gb)
    traced = []
    steps = feed.compile(make_step(feed.axis_name, traced), donate_carry=True)
    parts = feed.place(image=IMAGE, nested={"feat": FEAT}), on_host(label=LABEL, short=SHORT)
    carry, seen, done = parallel.replicate(np.int32(1), feed.devices), [], 0
    for call in feed.calls(steps, ROWS, *parts):
        each = {"weight": np.arange(done, done + call.steps, dtype=np.int32)}
        carry, outputs = steps.run(carry, np.int32(3), {}, call, each)
        seen += [jax.tree.map(lambda leaf: np.asarray(leaf)[i], outputs) for i in range(call.steps)]
        done += call.steps
    expected = 1
    for number, (rows, batch) in enumerate(zip(ROWS, seen, strict=True)):
        wanted = {"row": rows, "image": IMAGE[rows], "nested": {"feat": FEAT[rows]}, "label": LABEL[rows],
                  "short": SHORT[rows]}
        jax.tree.map(np.testing.assert_array_equal, batch, wanted)
        expected = 3 * expected + number * int(LABEL[rows].sum())
    assert carry == np.int64(expected).astype(np.int32)
    assert traced == [True]


def test_rows_beyond_the_last_stand_for_no_example():
    """They come as they are, with whatever else: what evaluation fills its last batch with."""
    for room_gb in (0, 1):
        feed = make_feed(2, room_gb=room_gb)
        steps = feed.compile(make_step(feed.axis_name))
        (call,) = feed.calls(steps, np.array([[19, 20, 21, 22]]), feed.place(label=LABEL))
        _, outputs = steps.run(np.int32(0), np.int32(1), {}, call, {"weight": np.int32([1])})
        np.testing.assert_array_equal(outputs["row"][0], [19, 20, 21, 22])
        np.testing.assert_array_equal(outputs["label"][0][:2], LABEL[19:])


def test_room_is_taken_and_given_back():
    """3 KiB on each of two devices: an array of 4 KiB finds room on them, a second one when the first is dropped."""
    feed = make_feed(2, room_gb=3 / 2 ** 20)
    first = feed.place(x=np.zeros((4, 1024), np.uint8))
    second = feed.place(x=np.zeros((4, 1024), np.uint8))
    assert set(first.resident) == {"x"} == set(second.host) and not first.host and not second.resident
    assert [leaf.addressable_shards[0].data.nbytes for leaf in first.resident.values()] == [2048]
    del first
    gc.collect()
    assert set(feed.place(x=np.zeros((4, 1024), np.uint8)).resident) == {"x"}


def test_what_is_placed_alike_lies_alike():
    """Room for one of two: both stay on the host, so that one program serves them; parts must be of one length."""
    feed = make_feed(1, room_gb=6 / 2 ** 20)
    views = feed.place_alike([{"x": np.zeros((4, 1024), np.uint8)}] * 2)
    assert [set(view.host) for view in views] == [{"x"}, {"x"}]
    assert set(feed.place(x=np.zeros((4, 1024), np.uint8)).resident) == {"x"}
    steps = feed.compile(make_step(None))
    with pytest.raises(ValueError, match=r"parts of \[4, 21\] examples"):
        next(feed.calls(steps, ROWS, views[0], on_host(label=LABEL)))


@pytest.mark.parametrize("room_gb", [0, 1])
def test_a_call_stays_within_its_bytes(monkeypatch, room_gb):
    """Four rows of 16 bytes and two steps' worth of bytes: two steps a call instead of 32."""
    monkeypatch.setattr("asib_jax.engine.feed._CALL_BYTES", 140)
    feed = make_feed(1, room_gb=room_gb)
    steps = feed.compile(make_step(None))
    calls = list(feed.calls(steps, ROWS, feed.place(label=LABEL, feat=FEAT)))
    assert [call.steps for call in calls] == [2, 2, 2, 1] and {len(call.rows) for call in calls} == {2}
