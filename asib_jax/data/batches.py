"""One epoch of a split as batches of numpy arrays."""
from collections.abc import Iterator

import numpy as np

from asib_jax.data.sources import Split


def training_batches(split: Split, batch_size: int, generator: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """An iterator over one epoch in the order `generator.permutation` gives; the incomplete last batch is dropped.

    Every batch holds `image` uint8 [B,H,W,ch], `label`, `index` (position in the source, which keys augmentation and
    noise) and `row` (position within `split`), each int32 [B]. Raises ValueError, at once, naming
    `dataset.batch_size` if the split does not fill one batch.
    """
    if not 0 < batch_size <= len(split.label):
        raise ValueError(f"dataset.batch_size = {batch_size} must lie in 1..{len(split.label)}, the images to train on")
    order = generator.permutation(len(split.label))
    starts = range(0, len(order) - batch_size + 1, batch_size)
    return (_batch(split, order[start : start + batch_size]) for start in starts)


def evaluation_batches(split: Split, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """An iterator over every example once, in order, in batches of one shape.

    As `training_batches`, with `mask` float32 [B] besides: 1 for an example, 0 for what pads the last batch (repeated
    examples, so that padding is as finite as data). Raises ValueError naming `dataset.batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"dataset.batch_size = {batch_size} must be at least 1")
    return (_evaluation_batch(split, start, batch_size) for start in range(0, len(split.label), batch_size))


def _evaluation_batch(split: Split, start: int, batch_size: int) -> dict[str, np.ndarray]:
    rows = np.arange(start, start + batch_size)
    size = len(split.label)
    return {**_batch(split, rows % size), "mask": (rows < size).astype(np.float32)}


def _batch(split: Split, rows: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "image": split.image[rows],
        "label": split.label[rows],
        "index": split.index[rows],
        "row": rows.astype(np.int32),
    }
