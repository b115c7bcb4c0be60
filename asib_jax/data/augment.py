"""Random changes to training images, inside jit. Each image draws from the key of its data-set index, so that what it
becomes depends on no batch and no device; mixing draws once for the global batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from asib_jax import streams
from asib_jax.errors import UserError

_JITTER = 0.4  # colour factors are drawn from 1 +- this
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601 weights of red, green, blue
_ERASE_PROBABILITY = 0.5
_ERASE_AREA = (0.02, 1 / 3)  # share of the image
_ERASE_RATIO = (0.3, 1 / 0.3)  # height / width


def augment(key: jax.Array, index: jax.Array, images: jax.Array, policy: int) -> jax.Array:
    """Images [B,H,W,C] (uint8 or float, 0..255) changed by one of `POLICIES` -> float32 [B,H,W,C], 0..255.

    `index` [B] is the position in the data set, which keys each image. Raises UserError naming `dataset.data_aug`
    for an unknown policy.
    """
    if policy not in POLICIES:
        raise UserError(f"dataset.data_aug = {policy} is unknown; it must be one of {', '.join(map(str, POLICIES))}")
    return jax.vmap(POLICIES[policy])(streams.per_example(key, index), images.astype(jnp.float32))


def _crop(key: jax.Array, image: jax.Array) -> jax.Array:
    """A random window of the image padded with zeros by H//8 on every side."""
    pad = image.shape[0] // 8
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _crop_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Crop, and mirror left to right half of the time (not for digits or text, which have a handedness)."""
    crop_key, flip_key = jax.random.split(key)
    image = _crop(crop_key, image)
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)


def _strong(key: jax.Array, image: jax.Array) -> jax.Array:
    """Crop, flip, colour jitter of three-channel images, random erasing."""
    crop_key, colour_key, erase_key = jax.random.split(key, 3)
    image = _crop_flip(crop_key, image)
    if image.shape[-1] == 3:
        image = _jitter(jax.random.uniform(colour_key, (3,), minval=1 - _JITTER, maxval=1 + _JITTER), image)
    return _erase(erase_key, image)


def _jitter(factors: jax.Array, image: jax.Array) -> jax.Array:
    """Brightness, contrast and saturation times the three `factors`, in this order, clipped to 0..255 each time."""
    image = jnp.clip(image * factors[0], 0, 255)
    mean = _grey(image).mean()
    image = jnp.clip(mean + factors[1] * (image - mean), 0, 255)
    grey = _grey(image)
    return jnp.clip(grey + factors[2] * (image - grey), 0, 255)


def _grey(image: jax.Array) -> jax.Array:
    return (image * jnp.array(_LUMA)).sum(-1, keepdims=True)  # no matmul: accelerators would round it


def _erase(key: jax.Array, image: jax.Array) -> jax.Array:
    """Random erasing (Zhong et al. 2020): with probability 1/2 a rectangle becomes the image's mean colour."""
    height, width, _ = image.shape
    apply, area, ratio, top, left = jax.random.uniform(key, (5,))
    area = height * width * (_ERASE_AREA[0] + area * (_ERASE_AREA[1] - _ERASE_AREA[0]))
    ratio = _ERASE_RATIO[0] * (_ERASE_RATIO[1] / _ERASE_RATIO[0]) ** ratio  # uniform in log(ratio)
    box_height = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, height)
    box_width = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, width)
    top = jnp.floor(top * (height - box_height + 1))
    left = jnp.floor(left * (width - box_width + 1))
    box = _rectangle(height, width, top, top + box_height, left, left + box_width)
    return jnp.where((apply < _ERASE_PROBABILITY) & box[..., None], image.mean((0, 1)), image)


def _rectangle(height: int, width: int, top, bottom, left, right) -> jax.Array:
    """[H,W] booleans: rows top..bottom-1, columns left..right-1."""
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


POLICIES: dict[int, Callable[[jax.Array, jax.Array], jax.Array]] = {
    0: lambda key, image: image,
    1: _crop_flip,
    2: _strong,
    3: _crop,  # for digits and text
}


def mix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """Mixes every image with a partner: (images, partners' labels, lam), for the loss lam CE(y) + (1 - lam) CE(y_b).

    Mixup (Zhang et al. 2018) if `mixup_alpha` > 0, cutmix (Yun et al. 2019) if `cutmix_alpha` > 0 (the caller excludes
    both), else images and labels unchanged and lam 1. lam ~ Beta(alpha, alpha) is one scalar for the batch, for cutmix
    corrected to the area really kept. Partners are a permutation of the global batch: inside a pmap over `axis_name`,
    with the same `key` on every device, the result is the slice of what one device would compute for the whole batch.
    images: [B,H,W,C] float; labels: [B].
    """
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        return images, labels, 1.0
    order_key, lam_key, box_key = jax.random.split(key, 3)
    partners, partner_labels = _partners(order_key, images, labels, axis_name)
    if mixup_alpha > 0:
        lam = jax.random.beta(lam_key, mixup_alpha, mixup_alpha)
        return lam * images + (1 - lam) * partners, partner_labels, lam
    box = _cutmix_box(box_key, jax.random.beta(lam_key, cutmix_alpha, cutmix_alpha), *images.shape[1:3])
    return jnp.where(box[..., None], partners, images), partner_labels, 1 - box.mean()


def _partners(
    key: jax.Array, images: jax.Array, labels: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """This device's images and labels of a random permutation of the global batch."""
    if axis_name is None:
        order = jax.random.permutation(key, len(labels))
        return images[order], labels[order]
    all_images, all_labels = jax.lax.all_gather((images, labels), axis_name, tiled=True)
    order = jax.random.permutation(key, len(all_labels))
    mine = jax.lax.dynamic_slice_in_dim(order, jax.lax.axis_index(axis_name) * len(labels), len(labels))
    return all_images[mine], all_labels[mine]


def _cutmix_box(key: jax.Array, lam: jax.Array, height: int, width: int) -> jax.Array:
    """[H,W] booleans of share 1 - lam around a uniform centre, cut off at the border."""
    size = jnp.floor(jnp.array([height, width]) * jnp.sqrt(1 - lam))
    centre = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    (top, left), (bottom, right) = centre - size // 2, centre + size // 2
    return _rectangle(height, width, top, bottom, left, right)
