"""Images that occur in several splits: never the same example, and how many copies of one under another index."""

import hashlib
import itertools
import logging

import numpy as np

from asib_jax.data.parts import Data
from asib_jax.data.sources import Split, blocks

logger = logging.getLogger("asib_jax")

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


def check(data: Data) -> dict[str, int]:
    """How many images of one split also occur in another, pixel by pixel, told in the log: a warning if of test.

    "duplicates/test_in_train" is how many test images the student's training images hold, "..._other_label" how many of
    them with other labels only; alike for validation, and for the teachers' images where they are more.

    Raises ValueError where an example, by its index, is in a split twice, in training and validation, or of the
    student's images and not of the teachers'. Images are compared by 64 bits of their hash.
    """
    _check_examples(data)
    whole, validation, test = map(image_digests, (data.teacher_train, data.validation, data.test))
    chosen = np.isin(data.teacher_train.index, data.train.index)
    places = {
        "train": (whole[chosen], data.teacher_train.label[chosen]),
        "validation": (validation, data.validation.label),
        "test": (test, data.test.label),
    }
    if not chosen.all():
        places["teacher_train"] = whole, data.teacher_train.label
    pairs = [
        ("test", "train"),
        ("test", "teacher_train"),
        ("test", "validation"),
        ("validation", "train"),
        ("validation", "teacher_train"),
    ]
    counts: dict[str, int] = {}
    told = []
    for part, other in pairs:
        if other in places:
            found, differ = duplicates(*places[part], *places[other])
            counts |= {f"duplicates/{part}_in_{other}": found, f"duplicates/{part}_in_{other}_other_label": differ}
            told += [f"{found} of {part} in {other} ({differ} with another label)"] if found else []
    level = logging.WARNING if any(counts[key] for key in counts if "/test_in_" in key) else logging.INFO
    if told:
        logger.log(level, "images that occur twice: %s", ", ".join(told))
    return counts


def _check_examples(data: Data) -> None:
    splits = {name: getattr(data, name).index for name in ("train", "teacher_train", "validation", "test")}
    for name, index in splits.items():
        if len(np.unique(index)) != len(index):
            raise ValueError(f"an example is in the {name} split twice")
    for name in ("train", "teacher_train"):
        if shared := np.intersect1d(splits[name], splits["validation"]).tolist():
            raise ValueError(f"{len(shared)} examples are in the {name} and the validation split: {shared[:5]}")
    if extra := np.setdiff1d(splits["train"], splits["teacher_train"]).tolist():
        raise ValueError(f"{len(extra)} examples are the student's and not the teachers': {extra[:5]}")


def image_digests(split: Split) -> np.ndarray:
    """64 bits of BLAKE2b (Aumasson et al. 2013) of each image: [N] uint64."""
    rows = itertools.chain.from_iterable(block.reshape(len(block), -1) for block in blocks(split.image))
    joined = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return np.frombuffer(joined, np.uint64)


def duplicates(
    digests: np.ndarray, labels: np.ndarray, others: np.ndarray, other_labels: np.ndarray
) -> tuple[int, int]:
    """How many of the first images are among the others, and how many of these under other labels only."""
    found = np.isin(digests, others)
    alike = np.isin(digests + labels.astype(np.uint64) * _ODD, others + other_labels.astype(np.uint64) * _ODD)
    return int(found.sum()), int((found & ~alike).sum())
