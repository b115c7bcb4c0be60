"""The parts of a data set that a run divides it into."""

from typing import NamedTuple

import numpy as np

from asib_jax.data.sources import Split


class Data(NamedTuple):
    """teacher_train: the training split without validation; train: what the student sees of it (`train_subset`).

    sees: which of the teachers' images each copy of a teacher trains on, [copies, N] of bool (`folds.sees`); None: all.
    """

    train: Split
    teacher_train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    origin: str
    sees: np.ndarray | None = None

    @property
    def copy_to_ask(self) -> np.ndarray | None:
        """Which copy of the teachers has not seen each of the student's images, [N]; None: there is one alone."""
        if self.sees is None or len(self.sees) == 1:
            return None
        order = np.argsort(self.teacher_train.index)
        rows = order[np.searchsorted(self.teacher_train.index, self.train.index, sorter=order)]
        return np.argmin(self.sees[:, rows], axis=0)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.test.image.shape[1:]


class Rows(NamedTuple):
    """Which rows of the training split are which part of `Data`; sees: as there."""

    train: np.ndarray
    teacher_train: np.ndarray
    validation: np.ndarray
    sees: np.ndarray | None = None
