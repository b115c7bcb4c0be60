"""One epoch of a split as the rows of its batches."""
import numpy as np

from asib_jax.errors import UserError


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
