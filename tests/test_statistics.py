"""Mean and deviation of pixels, beside whole numbers."""

import numpy as np
import pytest

from asib_jax.data import statistics
from asib_jax.data.sources import Selected


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 5, 3, 1), (50, 8, 6, 3), (2, 3, 3, 4), (3000, 48, 48, 3)])
def test_as_numpy_has_them(shape):
    """From exact sums of the values and their squares. The last takes several blocks."""
    images = np.random.default_rng(0).integers(0, 200, shape, np.uint8)
    values = images.reshape(-1, shape[-1]).astype(np.int64)
    count, sums, squares = len(values), values.sum(axis=0), (values**2).sum(axis=0)
    found = statistics.of_images(images)
    np.testing.assert_allclose(found.mean, sums / count / 255, rtol=1e-14)
    variance = np.array([int(count) * int(b) - int(a) ** 2 for a, b in zip(sums, squares)], float) / count**2
    np.testing.assert_allclose(found.std, np.sqrt(variance) / 255 if count > 1 else [1], rtol=1e-12)


def test_of_the_rows_alone_and_to_the_last_bit_in_any_order():
    images = np.random.default_rng(1).integers(0, 256, (400, 32, 32, 3), np.uint8)
    rows = np.random.default_rng(2).permutation(400)[:300]
    assert statistics.of_images(Selected(images, rows)) == statistics.of_images(images[np.sort(rows)])
    assert statistics.of_images(Selected(images, rows)) != statistics.of_images(images)


def test_a_channel_of_one_value_is_moved_to_zero():
    images = np.stack([np.full((4, 2, 2), 51, np.uint8), np.arange(16, dtype=np.uint8).reshape(4, 2, 2)], axis=-1)
    mean, std = statistics.of_images(images)
    assert mean[0] == pytest.approx(0.2) and std[0] == 1.0 and std[1] == pytest.approx(np.std(np.arange(16)) / 255)
    normalised = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalised.mean(axis=(0, 1, 2)), 0, atol=1e-12)


def test_extremes():
    images = np.zeros((2, 1, 1, 1), np.uint8)
    images[1] = 255
    assert statistics.of_images(images) == ((0.5,), (0.5,))
