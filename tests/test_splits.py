"""Stratified splits: exact sizes, every class on both sides, the same rows for the same seed."""

import numpy as np
import pytest

from asib_jax.data.splits import stratified_rows, stratified_subset, train_validation
from asib_jax.errors import UserError


def unbalanced():
    """Classes 0, 1, 2, 5 with 2, 10, 33 and 55 images, shuffled."""
    return np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [2, 10, 33, 55]))


def counts(labels):
    return dict(zip(*(column.tolist() for column in np.unique(labels, return_counts=True)), strict=True))


def test_train_validation_is_a_partition_with_proportional_classes():
    labels = unbalanced()
    train, val = train_validation(labels, 0.2, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(100))
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    # quotas .4, 2, 6.6, 11: class 0 gets its one image instead of .4, class 2 then rounds down
    assert counts(labels[val]) == {0: 1, 1: 2, 2: 6, 5: 11}


def test_large_fraction_leaves_every_class_in_training():
    labels = unbalanced()
    train, val = train_validation(labels, 0.9, seed=3)
    assert len(val) == 90 and counts(labels[train]) == {0: 1, 1: 1, 2: 3, 5: 5}


def test_balanced_classes_split_exactly():
    labels = np.tile(np.arange(10), 50)
    _, val = train_validation(labels, 0.1, seed=0)
    assert counts(labels[val]) == dict.fromkeys(range(10), 5)


def test_seed_decides():
    labels = unbalanced()
    rows = [train_validation(labels, 0.3, seed)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.97, 1.0, -0.1, 1.5])
def test_impossible_fraction_names_its_key(fraction):
    with pytest.raises(ValueError, match=r"dataset\.val_fraction"):
        train_validation(unbalanced(), fraction, seed=0)


def test_class_of_one_image_cannot_be_split():
    labels = np.array([0] * 9 + [1])
    with pytest.raises(UserError, match=r"1 of 2 classes have a single training image \(label 1\), .* x_val and y_val"):
        train_validation(labels, 0.5, seed=0)
    with pytest.raises(UserError, match=r"a single training image \(bee\), .*: add images"):
        train_validation(labels, 0.5, 0, ["ant", "bee"])
    with pytest.raises(UserError, match=r"9 of 9 classes have a single training image \(label 0, .* label 4, \.\.\.\)"):
        train_validation(np.arange(9), 0.5, seed=0)


@pytest.mark.parametrize("count", [4, 5, 37, 99, 100])
def test_subset_has_exactly_the_count_and_every_class(count):
    labels = unbalanced()
    rows = stratified_subset(labels, count, seed=1)
    assert len(np.unique(rows)) == count and (np.diff(rows) > 0).all()
    quotas = {c: count * n / 100 for c, n in counts(labels).items()}
    for c, n in counts(labels[rows]).items():
        assert n >= 1 and n - quotas[c] < 1  # largest remainder never gives a whole image too many, save the first


def test_subset_by_largest_remainder():
    labels = np.repeat([0, 1, 2], [10, 20, 70])  # quotas of 7 images: .7, 1.4, 4.9
    assert counts(labels[stratified_subset(labels, 7, seed=0)]) == {0: 1, 1: 1, 2: 5}


def test_ties_are_broken_by_chance():
    labels = np.repeat(np.arange(4), 5)  # quotas of 6 images: 1.5 each
    drawn = [counts(labels[stratified_subset(labels, 6, seed)]) for seed in range(8)]
    assert {tuple(sorted(count.values())) for count in drawn} == {(1, 1, 2, 2)}
    assert len({tuple(count.values()) for count in drawn}) > 1


@pytest.mark.parametrize("count", [3, 101])
def test_impossible_subset_names_its_key(count):
    with pytest.raises(ValueError, match=r"dataset\.train_subset"):
        stratified_subset(unbalanced(), count, seed=0)


def test_rows_within_a_class_are_drawn_uniformly():
    labels = np.zeros(10, int)
    chosen = np.concatenate([stratified_rows(labels, 3, np.random.default_rng(seed)) for seed in range(1000)])
    # each row is chosen 300 times on average, standard deviation 14.5
    np.testing.assert_allclose(np.bincount(chosen, minlength=10), 300, atol=4 * 14.5)
