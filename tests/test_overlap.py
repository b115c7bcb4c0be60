"""Splits that share examples are refused; copies under another index are counted, against a loop over all pairs."""

import logging

import numpy as np
import pytest

from asib_jax.data import overlap
from asib_jax.data.parts import Data
from asib_jax.data.sources import Split


def split(first_index, *images):
    """Of 2x2 images given as (colour, label)."""
    colours, labels = zip(*images)
    return Split(
        np.uint8(colours).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8),
        np.int32(labels),
        first_index + np.arange(len(images), dtype=np.int32),
    )


def by_hand(part, other):
    """(found, with another label) over all pairs."""
    labels = [
        {int(other.label[j]) for j in range(len(other.label)) if (other.image[j] == image).all()}
        for image in part.image
    ]
    return (
        sum(bool(found) for found in labels),
        sum(bool(found) and int(label) not in found for found, label in zip(labels, part.label)),
    )


TEACHER_TRAIN = split(0, (1, 0), (2, 1), (2, 2), (3, 0), (4, 1), (9, 2))
VALIDATION = split(6, (4, 0), (5, 1), (6, 2))
TEST = split(0, (1, 0), (1, 1), (2, 2), (2, 0), (5, 1), (7, 0), (9, 1), (9, 2))


def data(train=None, teacher_train=TEACHER_TRAIN, validation=VALIDATION, test=TEST):
    return Data(teacher_train if train is None else train, teacher_train, validation, test, tuple("abc"), "colours")


def test_copies_are_counted_in_the_log_too(caplog):
    with caplog.at_level(logging.INFO, "asib_jax"):
        counts = overlap.check(data())
    expected = {
        "test_in_train": by_hand(TEST, TEACHER_TRAIN),
        "test_in_validation": by_hand(TEST, VALIDATION),
        "validation_in_train": by_hand(VALIDATION, TEACHER_TRAIN),
    }
    assert expected == {"test_in_train": (6, 3), "test_in_validation": (1, 0), "validation_in_train": (1, 1)}
    assert counts == {
        f"duplicates/{name}{suffix}": count
        for name, pair in expected.items()
        for suffix, count in zip(("", "_other_label"), pair)
    }
    assert "6 of test in train (3 with another label)" in caplog.text


@pytest.mark.parametrize(
    "test, level",
    [
        (TEST, "WARNING"),
        (split(0, (5, 1), (7, 0)), "WARNING"),  # in validation
        (split(0, (7, 0), (8, 1)), "INFO"),
    ],
)  # though validation shares one with training
def test_copies_of_test_images_are_a_warning(caplog, test, level):
    with caplog.at_level(logging.INFO, "asib_jax"):
        overlap.check(data(test=test))
    assert [record.levelname for record in caplog.records] == [level]


def test_what_occurs_once_is_not_talked_of(caplog):
    alone = data(validation=split(6, (70, 1)), test=split(0, (71, 0)))
    with caplog.at_level(logging.INFO, "asib_jax"):
        assert set(overlap.check(alone).values()) == {0}
    assert not caplog.records


def test_a_students_subset_is_told_apart_from_the_teachers_images():
    counts = overlap.check(data(TEACHER_TRAIN.take(np.array([5, 1, 4]))))
    subset = split(0, (9, 2), (2, 1), (4, 1))
    for part, name in ((TEST, "test"), (VALIDATION, "validation")):
        for other, place in ((subset, "train"), (TEACHER_TRAIN, "teacher_train")):
            key = f"duplicates/{name}_in_{place}"
            assert (counts[key], counts[f"{key}_other_label"]) == by_hand(part, other)
    assert counts["duplicates/test_in_train"] == 4 != counts["duplicates/test_in_teacher_train"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validation": split(5, (8, 0), (8, 1))}, r"1 examples are in the train and the validation split: \[5\]"),
        (
            {"train": TEACHER_TRAIN.take(np.array([0])), "validation": split(5, (8, 0))},
            r"1 examples are in the teacher_train and the validation split: \[5\]",
        ),
        ({"train": split(9, (1, 0), (2, 0))}, r"2 examples are the student's and not the teachers': \[9, 10\]"),
        ({"train": TEACHER_TRAIN.take(np.array([0, 0]))}, "an example is in the train split twice"),
        ({"test": TEST.take(np.array([3, 2, 3]))}, "an example is in the test split twice"),
    ],
)
def test_splits_that_share_examples_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        overlap.check(data(**changes))


def test_every_byte_of_an_image_counts_and_selected_rows_are_hashed_as_they_stand():
    images = np.zeros((13, 2, 2, 3), np.uint8)
    images.reshape(13, 12)[np.arange(12), np.arange(12)] = 1
    whole = Split(images, np.zeros(13, np.int32), np.arange(13, dtype=np.int32))
    digests = overlap.image_digests(whole)
    assert digests.dtype == np.uint64 and len(set(digests.tolist())) == 13
    rows = np.array([7, 0, 12])
    np.testing.assert_array_equal(overlap.image_digests(whole.take(rows)), digests[rows])
