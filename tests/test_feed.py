"""Examples on their way to compiled steps: every step gets its own rows, in order, from wherever they lie."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from networks import make_feed

from asib_jax.engine import devices as devices_
from asib_jax.engine.feed import on_host

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
    """Bitwise, images, labels and features of two types, on the devices and on the host at once: whole calls, and what
    is left of the seven steps one by one; a program for each of the two."""
    feed = make_feed(devices, steps=at_once, room_gb=room_gb)
    traced = []
    steps = feed.compile(make_step(feed.axis_name, traced), donate_carry=True)
    parts = feed.place(image=IMAGE, nested={"feat": FEAT}), on_host(label=LABEL, short=SHORT)
    carry, seen, counts = devices_.replicate(np.int32(1), feed.devices), [], []
    for call in feed.calls(steps, ROWS, *parts):
        each = {"weight": np.arange(len(seen), len(seen) + len(call.rows), dtype=np.int32)}
        carry, outputs = steps.run(carry, np.int32(3), {}, call, each)
        seen += [jax.tree.map(lambda leaf: np.asarray(leaf)[i], outputs) for i in range(len(call.rows))]
        counts.append(len(call.rows))
    assert counts == {1: [1] * 7, 3: [3, 3, 1], 32: [1] * 7}[at_once]
    expected = 1
    for number, (rows, batch) in enumerate(zip(ROWS, seen, strict=True)):
        wanted = {
            "row": rows,
            "image": IMAGE[rows],
            "nested": {"feat": FEAT[rows]},
            "label": LABEL[rows],
            "short": SHORT[rows],
        }
        jax.tree.map(np.testing.assert_array_equal, batch, wanted)
        expected = 3 * expected + number * int(LABEL[rows].sum())
    assert carry == np.int64(expected).astype(np.int32)
    assert len(traced) == len(set(counts))


@pytest.mark.parametrize("first", [3, 6])
def test_who_goes_on_after_a_call_finds_the_calls_that_were_to_come(first):
    feed = make_feed(1, steps=3)
    steps, labels = feed.compile(make_step(None)), feed.place(label=LABEL)
    whole = [call.rows.tolist() for call in feed.calls(steps, ROWS, labels)]
    assert [call.rows.tolist() for call in feed.calls(steps, ROWS[first:], labels)] == whole[first // 3 :]


def test_rows_beyond_the_last_stand_for_no_example():
    """They come as they are, with whatever else: what evaluation fills its last batch with."""
    for room_gb in (0, 1):
        feed = make_feed(2, room_gb=room_gb)
        steps = feed.compile(make_step(feed.axis_name))
        (call,) = feed.calls(steps, np.array([[19, 20, 21, 22]]), feed.place(label=LABEL))
        _, outputs = steps.run(np.int32(0), np.int32(1), {}, call, {"weight": np.int32([1])})
        np.testing.assert_array_equal(outputs["row"][0], [19, 20, 21, 22])
        np.testing.assert_array_equal(outputs["label"][0][:2], LABEL[19:])


def test_what_exceeds_the_room_waits_on_the_host():
    """2 KiB on each of two devices: 4 KiB lie there, spread; 5 KiB do not."""
    feed = make_feed(2, room_gb=2 / 2**20)
    first, second = (feed.place(x=np.zeros((rows, 1024), np.uint8)) for rows in (4, 5))
    assert set(first.resident) == {"x"} == set(second.host) and not first.host and not second.resident
    assert [leaf.addressable_shards[0].data.nbytes for leaf in first.resident.values()] == [2048]


def test_parts_are_of_one_length():
    feed = make_feed()
    with pytest.raises(ValueError, match=r"parts of \[4, 21\] examples"):
        next(feed.calls(feed.compile(make_step(None)), ROWS, on_host(x=np.zeros(4)), on_host(label=LABEL)))


@pytest.mark.parametrize("room_gb", [0, 1])
def test_a_call_stays_within_its_bytes(room_gb):
    """Steps of 2 x 51 MB: of 32 only two fit the 256 MiB that a call's examples may take, and the seventh is alone."""
    feed = make_feed(1, room_gb=room_gb)
    large = np.broadcast_to(np.zeros((), np.uint8), (SIZE, 51 * 2**20))  # takes no memory
    examples = dataclasses.replace(on_host(label=LABEL), bytes_each=large.nbytes / SIZE)
    calls = list(feed.calls(feed.compile(make_step(None)), ROWS[:, :2], examples))
    assert [len(call.rows) for call in calls] == [2, 2, 2, 1]


def test_batches_of_evaluation_divide_by_the_devices():
    """As configured, or 32 on each CPU device, as many as a multiple of the devices asks for."""
    assert [make_feed(4, eval_batch=size).eval_batch_size for size in (0, 4, 5, 64)] == [128, 4, 8, 64]
    assert make_feed(1).eval_batch_size == 32
