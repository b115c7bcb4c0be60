"""The parts of a data set that a run divides it into."""

from typing import NamedTuple

import numpy as np

from asib_jax.data.sources import Split


class Data(NamedTuple):
    """teacher_train: the training split without validation; train: what the student sees of it (`train_subset`)."""

    train: Split
    teacher_train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    origin: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.test.image.shape[1:]


class Rows(NamedTuple):
    """Which rows of the training split are which part of `Data`."""

    train: np.ndarray
    teacher_train: np.ndarray
    validation: np.ndarray
