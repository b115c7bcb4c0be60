"""Rows of an epoch's batches: the order of the generator, every example once in evaluation."""

import numpy as np
import pytest

from asib_jax.data.splits import evaluation_rows, training_rows


def test_training_order_is_the_generators_and_the_rest_is_dropped():
    rows = training_rows(10, 4, np.random.default_rng(5))
    order = np.random.default_rng(5).permutation(10)
    np.testing.assert_array_equal(rows, [order[:4], order[4:8]])
    assert np.issubdtype(rows.dtype, np.integer)


def test_training_takes_whole_split_when_it_divides():
    rows = training_rows(8, 4, np.random.default_rng(0))
    assert rows.shape == (2, 4) and sorted(rows.ravel()) == list(range(8))


@pytest.mark.parametrize("batch_size", [0, -4, 11])
def test_impossible_training_batch_names_its_key(batch_size):
    with pytest.raises(ValueError, match=r"dataset\.batch_size = -?\d+ must lie in 1\.\.10"):
        training_rows(10, batch_size, np.random.default_rng(0))


@pytest.mark.parametrize("batch_size,number", [(1, 10), (4, 3), (5, 2), (10, 1), (64, 1)])
def test_evaluation_counts_every_example_once_in_one_shape(batch_size, number):
    """What fills the last batch is told by rows that no example has."""
    rows = evaluation_rows(10, batch_size)
    assert rows.shape == (number, batch_size)
    np.testing.assert_array_equal(rows[rows < 10], np.arange(10))
    assert (rows.ravel()[10:] >= 10).all()


def test_evaluation_batch_size_must_be_positive():
    with pytest.raises(ValueError, match=r"dataset\.batch_size = 0 must be at least 1"):
        evaluation_rows(10, 0)
