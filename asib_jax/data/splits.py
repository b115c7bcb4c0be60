"""Which rows of a data set: stratified choices fixed by a seed, and the batches of an epoch."""

from collections.abc import Sequence

import numpy as np

from asib_jax import streams
from asib_jax.errors import UserError


def train_validation(
    labels: np.ndarray, fraction: float, seed: int, class_names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Divides the rows of `labels` ([N] integers) into (train_rows, val_rows), both sorted, disjoint and complete.

    The validation set has round(fraction * N) rows, spread over the classes in proportion, with at least one image of
    every class on each side (SPEC 7). Raises UserError naming the classes of one image, by `class_names` where they are
    given, or `dataset.val_fraction` where it makes that impossible.
    """
    count = round(fraction * len(labels))
    values, sizes = np.unique(labels, return_counts=True)
    classes = len(values)
    if len(lonely := values[sizes < 2]):
        names = [class_names[k] if class_names else f"label {k}" for k in lonely]
        told = ", ".join(names[:5] + ["..."] * (len(names) > 5))
        raise UserError(
            f"{len(lonely)} of {classes} classes have a single training image ({told}), but validation is taken from "
            "these and needs one of every class, too: add images, leave the classes out, or give a validation split "
            "(val/<class>, or x_val and y_val)"
        )
    if not classes <= count <= len(labels) - classes:
        raise UserError(
            f"dataset.val_fraction = {fraction} asks for {count} of {len(labels)} images, which cannot leave an image "
            f"of each of {classes} classes on both sides; it must lie between {classes / len(labels):.3g} and "
            f"{1 - classes / len(labels):.3g}"
        )
    val_rows = stratified_rows(labels, count, streams.rng(seed, "validation"), leave=1)
    return np.setdiff1d(np.arange(len(labels)), val_rows), val_rows


def stratified_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Exactly `count` sorted rows of `labels` ([N] integers), spread over the classes in proportion.

    Raises UserError naming `dataset.train_subset` if `count` exceeds N or is less than one image a class.
    """
    classes = len(np.unique(labels))
    if not classes <= count <= len(labels):
        raise UserError(f"dataset.train_subset = {count} must lie in {classes} (one image a class)..{len(labels)}")
    return stratified_rows(labels, count, streams.rng(seed, "train_subset"))


def stratified_rows(labels: np.ndarray, count: int, generator: np.random.Generator, leave: int = 0) -> np.ndarray:
    """`count` sorted rows with at least one of every class, leaving at least `leave` of every class unchosen.

    Classes share `count` in proportion to their size by largest remainder; ties are broken by chance. The caller has
    made sure that such a choice exists.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    order = generator.permutation(len(classes))
    shares = _apportion(sizes[order], count, leave)
    rows = [
        generator.permutation(np.flatnonzero(labels == value))[:share]
        for value, share in zip(classes[order], shares, strict=True)
    ]
    return np.sort(np.concatenate(rows))


def _apportion(sizes: np.ndarray, count: int, leave: int) -> np.ndarray:
    """Integers that sum to `count`, each in 1..size-leave and as near to its proportional quota as that allows."""
    quotas = count * sizes / sizes.sum()
    shares = np.clip(np.floor(quotas).astype(int), 1, sizes - leave)
    while shares.sum() < count:
        shares[np.argmax(np.where(shares < sizes - leave, quotas - shares, -np.inf))] += 1
    while shares.sum() > count:
        shares[np.argmin(np.where(shares > 1, quotas - shares, np.inf))] -= 1
    return shares


def training_rows(size: int, batch_size: int, generator: np.random.Generator) -> np.ndarray:
    """Rows [S, B] of one epoch over `size` examples in the order `generator.permutation` gives.

    The incomplete last batch is dropped. Raises UserError naming `dataset.batch_size` if there is no complete one.
    """
    if not 0 < batch_size <= size:
        raise UserError(f"dataset.batch_size = {batch_size} must lie in 1..{size}, the images to train on")
    steps = size // batch_size
    return generator.permutation(size)[: steps * batch_size].reshape(steps, batch_size)


def evaluation_rows(size: int, batch_size: int) -> np.ndarray:
    """Rows [S, B] of every example once, in order; rows from `size` on fill the last batch and stand for no example.

    Raises UserError naming `dataset.batch_size` below 1.
    """
    if batch_size < 1:
        raise UserError(f"dataset.batch_size = {batch_size} must be at least 1")
    steps = -(-size // batch_size)
    return np.arange(steps * batch_size).reshape(steps, batch_size)
