"""Mean and standard deviation of pixels, by which networks normalise images."""

from typing import Any, NamedTuple

import numpy as np

from asib_jax.data.sources import Selected, blocks


class Statistics(NamedTuple):
    """Of pixels in [0, 1], for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


PUBLISHED = {"cifar100": Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}  # as everybody has them


def of_images(images: np.ndarray | Selected) -> Statistics:
    """Of uint8 images [N,H,W,ch], in float64; a channel that is the same everywhere has the deviation 1.

    They are found from how often each of the 256 values occurs, so that no order of summation shows.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for block in blocks(images):
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    values, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    return Statistics(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))


def differ(given: Any, found: Statistics) -> bool:
    """Whether images normalised by `mean` and `std` of `given` ([ch], or one value) are far from mean 0, deviation 1.

    Far: a channel's mean by more than half a deviation, or its deviation by more than a factor of 2.
    """
    mean, std = np.subtract(found.mean, given.mean) / given.std, np.divide(found.std, given.std)
    return bool((np.abs(mean) > 0.5).any() or (std > 2).any() or (std < 0.5).any())
