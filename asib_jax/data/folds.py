"""Which of the teachers' images each copy of a teacher trains on: cross-fitting by folds, or a hold-out (SPEC 13).

Images that are equal pixel by pixel stay together, so that no network has seen under one index what it is asked of
under another.
"""

from collections.abc import Sequence

import numpy as np

from asib_jax import streams
from asib_jax.data.splits import stratified_rows
from asib_jax.errors import UserError


def sees(
    labels: np.ndarray,
    digests: np.ndarray | None,
    folds: int,
    holdout: float,
    seed: int,
    class_names: Sequence[str] = (),
) -> np.ndarray:
    """Which rows of `labels` ([N] integers) each copy of a teacher trains on: [copies, N] of bool.

    folds: K copies, each without one of K stratified folds; 0: one copy, without a stratified share `holdout` of the
    rows. digests: [N], equal where images are; None: they are not known, and no two taken for equal.

    Raises UserError where a class has too few images that differ.
    """
    digests = np.arange(len(labels)) if digests is None else digests
    classes, own = np.unique(labels, return_inverse=True)
    names = [class_names[k] if class_names else f"label {k}" for k in classes]
    key, parts = (f"teacher_folds={folds}", folds) if folds else (f"teacher_holdout={holdout:g}", 2)
    _check_classes(own, digests, parts, key, names)
    if folds:
        place = np.arange(len(labels)) % folds  # of the rows sorted by class: sizes differ by 1 at the most
        quotas = np.bincount(np.sort(own) * folds + place, minlength=len(classes) * folds).reshape(-1, folds)
        part = _divided(own, digests, quotas, streams.rng(seed, "folds"))
        found = np.stack([part != fold for fold in range(folds)])
    else:
        count = round(holdout * len(labels))
        if not len(classes) <= count <= len(labels) - len(classes):
            raise UserError(
                f"{key} asks for {count} of {len(labels)} images, which cannot leave an image of each of "
                f"{len(classes)} classes on both sides"
            )
        generator = streams.rng(seed, "holdout")
        held = np.bincount(own[stratified_rows(labels, count, generator, leave=1)])
        part = _divided(own, digests, np.stack([held, np.bincount(own) - held], axis=1), generator)
        found = part[None] != 0
    for copy in found:
        if len(lost := np.setdiff1d(own, own[copy])):
            raise UserError(f"{key}: some copy would see no image of {names[lost[0]]}; most of its images occur twice")
    return found


def without(rows: np.ndarray, digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`rows` [copies, N] of bool without the images that are also, by their digests, among others."""
    return rows & ~np.isin(digests, others)


def _check_classes(own: np.ndarray, digests: np.ndarray, parts: int, key: str, names: list[str]) -> None:
    differ = np.bincount(np.unique(np.stack([own.astype(np.uint64), digests.astype(np.uint64)]), axis=1)[0].astype(int))
    if len(few := np.flatnonzero(differ < parts)):
        told = ", ".join([f"{names[k]} ({differ[k]})" for k in few[:5]] + ["..."] * (len(few) > 5))
        raise UserError(
            f"{key} divides the teachers' images into {parts} parts with an image of every class each, but "
            f"{len(few)} of {len(names)} classes have fewer that differ: {told}; "
            + (f"set teacher_folds={max(2, differ.min())} or fewer" if parts > 2 else "leave these classes out")
        )


def _divided(own: np.ndarray, digests: np.ndarray, quotas: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The part of each row, [N]: of class k (`own` [N]) `quotas[k]` ([classes, parts]) rows each, drawn by chance, as
    far as rows of equal digests, which share a part, allow."""
    part, left = np.full(len(own), -1), quotas.copy()
    order = np.argsort(digests, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(digests[order])) + 1)
    repeated = [group for group in groups if len(group) > 1]
    for number in sorted(generator.permutation(len(repeated)), key=lambda number: -len(repeated[number])):
        rows = repeated[number]
        wanted = np.bincount(own[rows], minlength=len(quotas))[:, None]
        room = np.minimum(left - wanted, 0).sum(axis=0)  # 0 where they fit
        best = np.lexsort((-(left * wanted).sum(axis=0), -room))[0]
        part[rows], left[:, best] = best, left[:, best] - wanted[:, 0]
    for k in range(len(quotas)):
        rows = generator.permutation(np.flatnonzero((own == k) & (part < 0)))
        shares = np.maximum(left[k], 0)
        while shares.sum() > len(rows):
            shares[np.argmax(shares)] -= 1
        part[rows] = np.repeat(np.arange(len(shares)), shares)
    return part
