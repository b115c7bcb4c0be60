"""Batches of an epoch: the order of the generator, every example once in evaluation."""
import numpy as np
import pytest

from asib_jax.data.batches import evaluation_batches, training_batches
from asib_jax.data.sources import Split


def split(n=10):
    image = np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3)
    return Split(image, np.arange(n, dtype=np.int32) % 4, np.arange(100, 100 + n, dtype=np.int32))


def test_training_order_is_the_generators_and_the_rest_is_dropped():
    data = split()
    batches = list(training_batches(data, 4, np.random.default_rng(5)))
    order = np.random.default_rng(5).permutation(10)[:8]
    assert len(batches) == 2
    np.testing.assert_array_equal(np.concatenate([b["row"] for b in batches]), order)
    for batch in batches:
        np.testing.assert_array_equal(batch["image"], data.image[batch["row"]])
        np.testing.assert_array_equal(batch["label"], data.label[batch["row"]])
        np.testing.assert_array_equal(batch["index"], batch["row"] + 100)
        assert {k: v.dtype for k, v in batch.items()} == {
            "image": np.uint8, "label": np.int32, "index": np.int32, "row": np.int32,
        }
        assert all(array.flags.c_contiguous for array in batch.values())


def test_training_takes_whole_split_when_it_divides():
    batches = list(training_batches(split(8), 4, np.random.default_rng(0)))
    assert sorted(np.concatenate([b["row"] for b in batches])) == list(range(8))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_impossible_training_batch_names_its_key_before_iteration(batch_size):
    with pytest.raises(ValueError, match=r"dataset\.batch_size"):
        training_batches(split(), batch_size, np.random.default_rng(0))


@pytest.mark.parametrize("batch_size,number", [(1, 10), (4, 3), (5, 2), (10, 1), (64, 1)])
def test_evaluation_counts_every_example_once_in_one_shape(batch_size, number):
    data = split()
    batches = list(evaluation_batches(data, batch_size))
    assert len(batches) == number
    assert {b["image"].shape for b in batches} == {(batch_size, 2, 2, 3)}
    masks = np.concatenate([b["mask"] for b in batches])
    assert masks.dtype == np.float32 and masks.sum() == 10
    kept = masks == 1
    for name, expected in (("image", data.image), ("label", data.label), ("index", data.index), ("row", np.arange(10))):
        np.testing.assert_array_equal(np.concatenate([b[name] for b in batches])[kept], expected)


def test_evaluation_batch_size_must_be_positive():
    with pytest.raises(ValueError, match=r"dataset\.batch_size"):
        evaluation_batches(split(), 0)
