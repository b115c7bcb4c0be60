"""Augmentation against numpy on single images, and mixing on one device against two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax import streams
from asib_jax.data.augment import augment, mix

KEY = streams.key(0, "augment", 0, 0)


def pictures(n, height=8, width=8, channels=3):
    return np.random.default_rng(1).integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def run(images, policy, index=None):
    index = np.arange(len(images)) if index is None else index
    return np.asarray(jax.jit(augment, static_argnums=3)(KEY, index, images, policy))


def windows(image, pad):
    """Every crop of `image` padded with zeros, by its offset."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return {(y, x): padded[y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)}


def test_policy_0_only_converts():
    images = pictures(3)
    out = run(images, 0)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("policy,mirrored", [(1, {False, True}), (3, {False})])
def test_crop_and_flip_give_every_window_equally_often(policy, mirrored):
    images, n = pictures(1, 16, 5), 1250  # padded by 16 // 8
    found = []
    for picture in run(np.repeat(images, n, 0), policy):
        found += [
            (offset, flip)
            for offset, window in windows(images[0], 2).items()
            for flip in (False, True)
            if np.array_equal(picture, window[:, ::-1] if flip else window)
        ]
    assert len(found) == n  # each is one window, once
    assert {flip for _, flip in found} == mirrored
    offsets = np.unique([offset for offset, _ in found], axis=0, return_counts=True)[1]
    np.testing.assert_allclose(offsets, np.full(25, 50), atol=4 * 7)  # 4 standard deviations
    if True in mirrored:
        assert abs(sum(flip for _, flip in found) - 625) < 4 * 18


def test_what_an_wholebecomes_depends_on_its_index_alone():
    images, order = pictures(6), np.array([4, 1, 0, 5, 2, 3])
    whole = run(images, 2)
    np.testing.assert_array_equal(run(images[order], 2, order), whole[order])
    assert not np.array_equal(run(images, 2, np.arange(6) + 6), whole)
    halves = jax.pmap(lambda i, x: augment(KEY, i, x, 2), devices=jax.devices()[:2])(
        np.arange(6).reshape(2, 3), images.reshape(2, 3, 8, 8, 3)
    )
    np.testing.assert_allclose(np.reshape(halves, whole.shape), whole, rtol=0, atol=1e-4)  # of 255


def grey(image):
    return (image * [0.299, 0.587, 0.114]).sum(-1, keepdims=True)


def jittered(image, factors):
    """Brightness, contrast, saturation in float64."""
    out = np.clip(image * factors[0], 0, 255)
    out = np.clip(factors[1] * out + (1 - factors[1]) * grey(out).mean(), 0, 255)
    return np.clip(factors[2] * out + (1 - factors[2]) * grey(out), 0, 255)


def test_jitter_matches_numpy():
    """Where nothing is clipped the result is a sum of the image, its grey and that's mean, whose weights tell the three
    factors; an image of all values and of the same index then is clipped after each of them. Below 8 pixels nothing
    moves."""
    n, whole = 60, pictures(1, 7, 7)[0].astype(np.float64)
    middling = np.floor(60 + whole / 6)
    found = []
    for few, many in zip(run(np.repeat(middling[None], n, 0), 2), run(np.repeat(whole[None], n, 0), 2)):
        for side in (1, -1):
            image = middling[:, ::side]
            mean = np.full_like(image, grey(image).mean())
            terms = np.stack([image, np.broadcast_to(grey(image), image.shape), mean], -1).reshape(-1, 3)
            weights = np.linalg.lstsq(terms, few.ravel(), rcond=None)[0]
            if np.abs(terms @ weights - few.ravel()).max() < 1e-3:  # else it is the other side or partly erased
                coloured = weights[0] + weights[1]
                found.append((weights.sum(), coloured / weights.sum(), weights[0] / coloured))
                np.testing.assert_allclose(many, jittered(whole[:, ::side], found[-1]), rtol=0, atol=0.02)
    assert abs(len(found) - n / 2) < 4 * np.sqrt(n / 4)
    assert np.min(found) > 0.6 - 1e-4 and np.max(found) < 1.4 + 1e-4
    assert (np.ptp(found, axis=0) > 0.5).all()
    assert np.abs(np.corrcoef(found, rowvar=False) - np.eye(3)).max() < 0.7  # three draws, not one


def test_erasing_fills_a_rectangle_with_the_mean_colour():
    """Of two channels, so that there is no jitter, and below 8 pixels, so that nothing moves."""
    image, n = pictures(1, 7, 7, channels=2)[0].astype(np.float32), 400
    out = run(np.repeat(image[None], n, 0), 2)
    changed = np.stack([(out != image).any(-1), (out != image[:, ::-1]).any(-1)])  # as it was, or mirrored
    changed = np.where((changed[0].sum((1, 2)) < changed[1].sum((1, 2)))[:, None, None], *changed)
    erased = changed.any((1, 2))
    assert abs(erased.sum() - n / 2) < 4 * np.sqrt(n / 4)
    shares = []
    for picture, mask in zip(out[erased], changed[erased], strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        np.testing.assert_allclose(picture[mask], np.broadcast_to(image.mean((0, 1)), picture[mask].shape), rtol=1e-5)
        shares.append(mask.mean())
    # uniform in 2 %..33 %; rounding and the border move single values
    assert min(shares) < 0.06 and 0.25 < max(shares) < 0.42 and abs(np.mean(shares) - 0.17) < 0.03


def test_strong_jitters_colour_but_not_grey():
    # In a uniform picture that keeps its place, erasing and contrast change nothing and brightness scales all.
    colour = run(np.full((300, 8, 8, 3), 100, np.uint8), 2)
    level = colour[np.ptp(colour, (1, 2, 3)) < 1e-3][:, 0, 0, 0]
    assert len(level) > 10 and 60 <= level.min() < 80 and 120 < level.max() <= 140
    grey = run(np.full((50, 8, 8, 1), 100, np.uint8), 2)
    assert (grey == 100).any((1, 2, 3)).all() and grey.max() == 100


def test_unknown_policy_names_its_key():
    with pytest.raises(ValueError, match=r"dataset\.data_aug = 7.*0, 1, 2, 3"):
        augment(KEY, np.arange(2), pictures(2), 7)


def test_no_mixing_returns_its_arguments():
    images, labels = jnp.ones((2, 4, 4, 1)), jnp.arange(2)
    assert mix(KEY, images, labels, mixup_alpha=0.0, cutmix_alpha=0.0) == (images, labels, 1.0)


def both(key, images, labels, axis_name=None):
    """The same draw by mixup and by cutmix."""
    return [
        mix(key, images, labels, mixup_alpha=mixup, cutmix_alpha=cutmix, axis_name=axis_name)
        for mixup, cutmix in ((0.4, 0.0), (0.0, 0.4))
    ]


@pytest.fixture(scope="module")
def draws():
    """A batch mixed 2000 times by mixup and by cutmix. Its labels are its row numbers: labels_b tells the partners."""
    images = pictures(8, 8, 6).astype(np.float32)
    mixed = jax.jit(jax.vmap(both, (0, None, None)))(jax.random.split(KEY, 2000), jnp.asarray(images), jnp.arange(8))
    return images, *([np.asarray(array) for array in way] for way in mixed)


def test_mixup_is_the_convex_combination_with_a_permutation_and_beta_weight(draws):
    images, (mixed, partners, lams), _ = draws
    for out, rows, lam in zip(mixed[:4], partners[:4], lams[:4], strict=True):
        assert sorted(rows) == list(range(8))
        np.testing.assert_allclose(out, lam * images + (1 - lam) * images[rows], rtol=1e-5)
    assert abs(lams.mean() - 0.5) < 0.03  # standard error .008
    assert abs(lams.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # Beta(a, a): 1 / (4 (2a + 1)) = .139


def test_cutmix_pastes_one_rectangle_and_counts_its_area(draws):
    images, _, (mixed, partners, lams) = draws
    for out, rows, lam in zip(mixed[:20], partners[:20], lams[:20], strict=True):
        pasted = (out != images).any((0, 3))
        assert pasted.sum() == pasted.any(1).sum() * pasted.any(0).sum()
        np.testing.assert_allclose(lam, 1 - pasted.mean(), atol=1e-6)
        np.testing.assert_array_equal(out, np.where(pasted[..., None], images[rows], images))


def test_cutmix_box_has_the_drawn_share():
    """A Beta of huge parameters is its mean, a half: 22 of 32 pixels on a side, at a corner half of them."""
    images, labels = jnp.zeros((2, 32, 32, 1)), jnp.arange(2)
    draw = jax.jit(jax.vmap(lambda key: mix(key, images, labels, mixup_alpha=0.0, cutmix_alpha=1e8)[2]))
    areas = np.round(32 * 32 * (1 - np.asarray(draw(jax.random.split(KEY, 500))))).astype(int)
    assert areas.max() == 22 * 22 and areas.min() == 11 * 11


def test_two_devices_mix_as_one():
    images, labels = jnp.asarray(pictures(8), jnp.float32), jnp.arange(8)
    on_two = jax.pmap(
        lambda key, x, y: both(key, x, y, "devices"), "devices", in_axes=(None, 0, 0), devices=jax.devices()[:2]
    )(KEY, images.reshape(2, 4, 8, 8, 3), labels.reshape(2, 4))
    for (whole, partners, lam), (shards, shard_partners, lams) in zip(jax.jit(both)(KEY, images, labels), on_two):
        np.testing.assert_array_equal(np.ravel(shard_partners), partners)
        np.testing.assert_allclose(lams, np.full(2, lam), rtol=1e-6)
        np.testing.assert_allclose(np.reshape(shards, whole.shape), whole, rtol=1e-5)
        assert set(np.asarray(partners[:4]).tolist()) - set(range(4))  # partners do come from the other device
