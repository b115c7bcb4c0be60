"""Every source but CIFAR-100, from small originals in their real layout; malformed arrays are named."""

import hashlib
import os

import numpy as np
import pytest

from asib_jax.data import archives, arrays, sources
from asib_jax.data.sources import SOURCES, Split, blocks, images_digest, load, sizes
from asib_jax.errors import UserError

TRAIN, TEST = 7, 4  # images of either split


def small(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, count)


IMAGES, _ = small(TRAIN, 0)


def write_npz(path, **changes):
    """Well-formed arrays save for `changes`; None leaves one out."""
    (x_train, y_train), (x_test, y_test) = small(TRAIN, 0), small(TEST, 1)
    names = np.array([f"class{c}" for c in range(100)])
    given = dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, class_names=names) | changes
    np.savez(path, **{name: array for name, array in given.items() if array is not None})
    return path


def test_digits_are_whole_stratified_and_scaled():
    from sklearn.datasets import load_digits

    data, original = load("digits"), load_digits()
    assert data.num_classes == 10 and len(data.train.label) == 1258 and len(data.test.label) == 539
    images = np.concatenate([data.train.image, data.test.image])
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1)
    # the same images with the same labels, in another order
    ours = np.column_stack([images.reshape(1797, 64), np.concatenate([data.train.label, data.test.label])])
    theirs = np.column_stack([np.rint(original.data / 16 * 255), original.target])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    shares = np.bincount(data.test.label) / np.bincount(original.target)
    np.testing.assert_allclose(shares, 0.3, atol=0.004)  # half an image of 174


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("array", ["x_train", "class_names"])
def test_pickled_array_in_npz_is_refused(tmp_path, array):
    marker = tmp_path / "executed"
    path = write_npz(tmp_path / "own.npz", **{array: np.array([Hostile(marker)], dtype=object)})
    with pytest.raises(ValueError, match=f"own.npz: array {array} cannot be read"):
        load("npz", path=str(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"x_train": np.zeros((TRAIN, 32, 32, 3), np.int16)}, r"own\.npz: x_train must be uint8.*found int16 \[7, 32"),
        ({"x_train": np.zeros((TRAIN, 32, 32, 3), bool)}, "x_train must be uint8.*found bool"),
        ({"x_test": np.zeros((TEST, 3072), np.uint8)}, r"x_test must be uint8 \[N,H,W,ch.*found uint8 \[4, 3072\]"),
        ({"x_test": np.zeros((TEST, 32, 32), np.uint8)}, r"x_test is uint8 \[4, 32, 32, 1\], but x_train is .*32, 3\]"),
        ({"x_train": np.full((TRAIN, 32, 32, 3), 255.0)}, r"x_train is float64 in 255\.\.255, .* 0\.\.1, .*astype"),
        ({"x_test": np.full((TEST, 32, 32, 3), -0.5, np.float16)}, r"x_test is float16 in -0\.5\.\.-0\.5"),
        ({"x_train": np.full((TRAIN, 32, 32, 3), np.nan)}, r"x_train is float64 in nan\.\.nan"),
        ({"x_train": np.full((TRAIN, 32, 32, 3), np.inf)}, r"x_train is float64 in inf\.\.inf"),
        (
            {"x_train": np.zeros((TRAIN, 3, 32, 32), np.uint8)},
            r"channels first, uint8 \[7, 3, 32, 32\].*save x_train\.transpose\(0, 2, 3, 1\)$",
        ),
        ({"x_train": np.zeros((TRAIN, 1, 8, 8))}, r"channels first, float64 \[7, 1, 8, 8\]"),
        ({"x_train": np.zeros((TRAIN, 9, 9, 5), np.uint8)}, r"must have 1 to 4 channels, .* uint8 \[7, 9, 9, 5\]"),
        ({"x_train": np.full((TRAIN, 32, 32, 3), 7, np.uint8)}, "every pixel of every training image is 7 of 0"),
        ({"x_train": np.ones((TRAIN, 32, 32, 3))}, "every pixel of every training image is 255 of 0"),
        ({"x_train": np.full((TRAIN, 32, 32, 3), 1e-3)}, "every pixel of every training image is 0 of 0"),
        ({"y_train": np.full(TRAIN, 3)}, "all training images are of one class, 'class3'"),
        ({"y_train": np.zeros(TRAIN, int), "y_test": np.zeros(TEST, int), "class_names": None}, "of one class, '0'"),
        ({"x_val": np.zeros((TEST, 32, 32, 3), np.uint8)}, "own.npz has x_val without y_val"),
        ({"y_val": np.zeros(TEST, int)}, "own.npz has y_val without x_val"),
        ({"x_val": np.zeros((TEST, 32, 32, 1), np.uint8), "y_val": np.zeros(TEST, int)}, "x_val is .* but x_train is"),
        (
            {"x_val": np.zeros((1, 32, 32, 3), np.uint8), "y_val": np.array([100])},
            r"y_val must lie in 0\.\.99; found 100",
        ),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8)}, r"x_test must be .* not empty; found uint8 \[0"),
        ({"x_test": np.zeros((TEST, 16, 16, 3), np.uint8)}, r"x_test is uint8 \[4, 16.*x_train is uint8 \[7, 32"),
        ({"y_train": np.zeros(TRAIN - 1, int)}, r"y_train must be integers \[7\].*found int64 \[6\]"),
        ({"y_test": np.zeros(TEST)}, r"y_test must be integers \[4\].*found float64"),
        ({"y_test": np.full(TEST, 100)}, r"y_test must lie in 0\.\.99; found 100\.\.100"),
        ({"y_train": np.arange(TRAIN) - 1}, r"y_train must lie in 0\.\.99; found -1\.\.5"),
        (
            {"y_train": np.arange(TRAIN), "y_test": np.full(TEST, 8), "class_names": None},
            r"y_test must .* 0\.\.6; found 8",
        ),
        (
            {"y_train": np.arange(TRAIN) % 2 * 5, "y_test": np.full(TEST, 3), "class_names": None},
            "no 1, 2, 3, 4; labels",
        ),
        (
            {"y_train": np.arange(TRAIN) + 1, "y_test": np.ones(TEST, int), "class_names": None},
            "y_train has no 0; labels must be 0",
        ),
        (
            {"y_train": np.arange(TRAIN) + 9, "y_test": np.ones(TEST, int), "class_names": None},
            r"y_train has no 0, 1, .*4, \.\.\.;",
        ),
        ({"class_names": np.arange(100)}, r"class_names must be text \[C\]; found int64 \[100\]"),
        ({"class_names": np.full((100, 4), 0x110000, np.uint32).view("U4")[:, 0]}, "class_names is not all text"),
        ({"class_names": np.array(["\udc80"] * 100)}, "class_names is not all text"),
        ({"y_test": np.zeros(TEST, "m8[s]")}, r"y_test must be integers \[4\].*found timedelta64"),
        ({"y_train": np.arange(TRAIN) + 99_994, "class_names": None}, "y_train has the label 100000; more than 100000"),
        ({"y_test": None}, r"own\.npz lacks the arrays y_test; it holds x_train, y_train, x_test, class_names"),
    ],
)
def test_malformed_arrays_are_named(tmp_path, changes, message):
    path = write_npz(tmp_path / "own.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load("npz", path=str(path))


def test_npz_without_names_numbers_its_classes(tmp_path):
    labels = np.arange(256).astype(np.uint8)
    path = write_npz(
        tmp_path / "own.npz", x_train=small(256, 0)[0], y_train=labels, y_test=np.arange(TEST), class_names=None
    )
    assert load("npz", path=str(path)).class_names == tuple(str(c) for c in range(256))


def test_named_classes_without_images_are_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(arrays.logger, "propagate", True)
    names = np.array(["a", "b", "c", "d", "e"])
    labels = {"y_train": np.arange(TRAIN) % 2 * 3, "y_test": np.arange(TEST) % 2 * 3}
    path = write_npz(tmp_path / "own.npz", class_names=names, **labels)
    assert load("npz", path=str(path)).class_names == tuple(names)
    assert "3 classes of 5 have no training image: b, c, e" in caplog.text and len(caplog.records) == 1
    caplog.clear()
    names = names[: min(TRAIN, TEST)]
    labels = {"y_train": np.arange(TRAIN) % len(names), "y_test": np.arange(TEST) % len(names)}
    load("npz", path=str(write_npz(path, class_names=names, **labels)))
    assert not caplog.records


def test_a_class_without_images_in_a_split_is_a_warning(tmp_path, caplog, monkeypatch):
    """Of those with training images; a run's test accuracy says nothing of them."""
    monkeypatch.setattr(arrays.logger, "propagate", True)
    changes = {"y_train": np.arange(TRAIN), "y_test": np.array([0, 1, 1, 6]), "class_names": np.array(list("abcdefgh"))}
    changes |= {"x_val": IMAGES[:6], "y_val": np.array([1, 2, 3, 4, 5, 6])}
    load("npz", path=str(write_npz(tmp_path / "own.npz", **changes)))
    absent, val, test = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert absent.endswith("own.npz: 1 classes of 8 have no training image: h")
    assert "the validation split has no image of 1 of the 7 classes" in val and val.endswith(": a")
    assert "the test split has no image of 4 of the 7 classes" in test and test.endswith(": c, d, e, f")


def test_arrays_of_other_names_are_told(tmp_path, caplog, monkeypatch):
    """x_valid is no validation split."""
    monkeypatch.setattr(archives.logger, "propagate", True)
    labels = {"y_train": np.arange(TRAIN) % 2, "y_test": np.arange(TEST) % 2, "class_names": None}
    path = write_npz(tmp_path / "own.npz", **labels, x_valid=small(2, 3)[0], y_valid=np.arange(2))
    assert load("npz", path=str(path)).validation is None
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == f"{path}: not read: x_valid, y_valid; what may be there is called x_val, y_val, class_names"


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"x_train": IMAGES // 255}, "x_train lies in 0..1 of 0..255, which is black"),
        ({"x_train": IMAGES / 255 / 255}, "x_train lies in 0..1 of 0..255, which is black"),
        ({"x_test": IMAGES[:TEST] // 128}, "x_test lies in 0..1 of 0..255, which is black"),
        ({"x_train": IMAGES // 255 * 255}, ""),  # masks of black and white
        ({"class_names": np.array(["crane", "maillot"] * 2 + [f"c{k}" for k in range(96)])}, "'crane' 2 times, 'mail"),
    ],
)
def test_what_is_read_but_hardly_meant_is_told(tmp_path, changes, told, caplog, monkeypatch):
    monkeypatch.setattr(arrays.logger, "propagate", True)
    load("npz", path=str(write_npz(tmp_path / "own.npz", **changes)))
    warnings = [text for text in caplog.messages if "no training image" not in text and "has no image of" not in text]
    assert [told in text for text in warnings] == [True] * bool(told), warnings


def test_grey_and_floats_become_bytes_with_channels_and_that_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(arrays.logger, "propagate", True)
    caplog.set_level("INFO")
    levels = np.random.default_rng(0).random((TRAIN, 5, 6), np.float32)
    levels[0, 0, :2] = 0, 1
    labels = {"y_train": np.arange(TRAIN) % 2, "y_test": np.arange(TEST) % 2, "class_names": None}
    changes = {"x_train": levels, "x_test": levels[:TEST].astype(np.float64)[..., None]}
    data = load("npz", path=str(write_npz(tmp_path / "own.npz", **changes, **labels)))
    np.testing.assert_array_equal(data.train.image[..., 0], np.floor(levels * 255 + np.float32(0.5)).astype(np.uint8))
    np.testing.assert_array_equal(data.test.image, data.train.image[:TEST])
    train, test = (record.getMessage() for record in caplog.records)
    assert train.endswith("own.npz: x_train is grey: it has one channel, was scaled from 0..1 to 0..255")
    assert test.endswith("own.npz: x_test was scaled from 0..1 to 0..255")


def test_the_own_validation_split_of_an_npz(tmp_path):
    """Its index goes on after that of training, so that no example has another's."""
    own = {"x_val": small(3, 5)[0], "y_val": np.array([2, 0, 1])}
    path = str(write_npz(tmp_path / "own.npz", **own))
    found = load("npz", path=path).validation
    for array, expected in zip(found, (*own.values(), TRAIN + np.arange(3)), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert found.label.dtype == found.index.dtype == np.int32
    assert sizes("npz", path=path).validation == 3 and load("digits").validation is None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_are_resized(tmp_path, channels):
    """A ramp stays a ramp; what alternates from pixel to pixel becomes its mean, not one of both."""
    ramp, stripes = np.arange(0, 256, 2), np.arange(128) % 2 * 255
    x_train = np.broadcast_to(np.stack([ramp, stripes])[:, None, :, None], (2, 96, 128, channels)).astype(np.uint8)
    labels = {"y_train": np.arange(2), "y_test": np.arange(2), "class_names": None}
    path = str(write_npz(tmp_path / "own.npz", x_train=x_train, x_test=x_train[::-1], **labels))
    data = load("npz", path=path, image_size=12)
    assert data.train.image.shape == (2, 12, 12, channels)
    expected = ramp[16:112].reshape(12, 8).mean(1)  # the middle 96 columns, in eights
    np.testing.assert_allclose(data.train.image[0] - expected[:, None], 0, atol=3)
    np.testing.assert_allclose(data.train.image[1, :, 1:-1], 127.5, atol=3)
    np.testing.assert_array_equal(data.test.image, data.train.image[::-1])
    assert sizes("npz", path=path, image_size=12).image_shape == (12, 12, channels)
    assert sizes("cifar100", image_size=12).image_shape == (12, 12, 3)


@pytest.mark.parametrize("map_bytes", [0, archives._MAP_BYTES], ids=["mapped", "read"])
def test_imagenet32_joins_batches_in_numerical_order(tmp_path, monkeypatch, map_bytes):
    monkeypatch.setattr(archives, "_MAP_BYTES", map_bytes)
    parts = {f"train_data_batch_{k}": small(2, k) for k in (1, 2, 10)} | {"val_data": small(3, 99)}
    for name, (image, label) in parts.items():
        np.savez(tmp_path / f"{name}.npz", data=rows(image), labels=label + 1, mean=np.zeros(3072))
    data = load("imagenet32", path=str(tmp_path))
    *train, (val_image, val_label) = parts.values()
    np.testing.assert_array_equal(data.train.image, np.concatenate([image for image, _ in train]))
    np.testing.assert_array_equal(data.train.label, np.concatenate([label for _, label in train]))
    np.testing.assert_array_equal(data.test.image, val_image)
    np.testing.assert_array_equal(data.test.label, val_label)
    assert data.num_classes == 1000
    image, label = parts["train_data_batch_1"]
    np.savez(tmp_path / "train_data_batch_1.npz", data=rows(image).astype(np.uint16), labels=label)
    with pytest.raises(ValueError, match=r"x_train must be uint8 .* found uint16 \[6, 32, 32, 3\]"):
        load("imagenet32", path=str(tmp_path))
    np.savez(tmp_path / "train_data_batch_2.npz", data=np.zeros((2, 192), np.uint8), labels=np.ones(2, int))
    with pytest.raises(ValueError, match=r"train_data_batch_2\.npz: data must have shape \[N,3072\], found \[2, 192\]"):
        load("imagenet32", path=str(tmp_path))
    (tmp_path / "train_data_batch_1_copy.npz").touch()
    with pytest.raises(UserError, match="train_data_batch_1_copy.npz, which is no train_data_batch_NUMBER.npz"):
        load("imagenet32", path=str(tmp_path))
    (tmp_path / "train_data_batch_1_copy.npz").unlink()
    (tmp_path / "val_data.npz").unlink()
    with pytest.raises(ValueError, match=r"dataset\.path.*val_data\.npz"):
        load("imagenet32", path=str(tmp_path))


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.array(["1", "2", "3"]), r"integers \[3\], one per image; found <U1 \[3\]"),
        (np.array(3), r"integers \[3\], one per image; found int64 \[\]"),
        (np.ones((3, 1), int), r"found int64 \[3, 1\]"),
        (np.ones(3), "found float64"),
        (np.array([1, 0, 2], np.uint8), r"1\.\.1000; found 0\.\.2"),  # 0 - 1 would be 255
        (np.array([1, 2, 2**32 + 1]), r"1\.\.1000; found 1\.\.4294967297"),
    ],
)
@pytest.mark.parametrize("name", ["train_data_batch_2", "val_data"])
def test_imagenet32_names_the_file_of_wrong_labels(tmp_path, name, labels, message):
    for part in ("train_data_batch_1", "train_data_batch_2", "val_data"):
        given = labels if part == name else np.ones(3, int)
        np.savez(tmp_path / f"{part}.npz", data=rows(small(3, 0)[0]), labels=given)
    with pytest.raises(UserError, match=rf"{name}\.npz: labels must .*{message}"):
        load("imagenet32", path=str(tmp_path))


def rows(image):
    return image.transpose(0, 3, 1, 2).reshape(len(image), -1)


@pytest.mark.parametrize("name", ["npz", "imagenet32", "folder"])
def test_missing_path_names_its_key(name):
    with pytest.raises(ValueError, match=r"dataset\.path"):
        load(name)


def test_path_that_does_not_exist_names_its_key(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.path"):
        load("cifar100", path=str(tmp_path / "absent.npz"))


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "own.npz")
    for name in ("npz", "cifar100", "folder"):
        with pytest.raises(UserError, match=r"dataset\.path = .*own\.npz' is a pipe"):
            load(name, path=str(tmp_path / "own.npz"))


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"dataset\.name = 'cifar' .*" + ", ".join(SOURCES)):
        load("cifar")


def plain_split(count=50):
    image, label = small(count, 3)
    return Split(image, label.astype(np.int32), np.arange(100, 100 + count, dtype=np.int32))


def test_a_taking_of_a_taking_is_the_plain_arrays():
    """All values are those of indexing the arrays themselves; images are never copied."""
    train, outer, inner = plain_split(), np.array([40, 4, 1, 4, 33]), np.array([4, 0, 3])
    part = train.take(outer).take(inner)
    image, *others = (array[outer][inner] for array in train)
    for actual, expected in zip(part[1:], others, strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == np.int32
    assert part.image.base is train.image and len(part.image) == 3
    assert (part.image.shape, part.image.dtype, part.image.ndim) == (image.shape, image.dtype, image.ndim)
    for key in (np.array([2, 0, 0]), np.array([[1, 2], [0, -1]]), slice(None), slice(1, 9), 1, -1, np.int32(2)):
        np.testing.assert_array_equal(part.image[key], image[key])
        assert type(part.image[key]) is np.ndarray and part.image[key].flags.c_contiguous
    np.testing.assert_array_equal(np.ascontiguousarray(part.image), image)
    np.testing.assert_array_equal(np.array(part.image, np.float32), image.astype(np.float32), strict=True)
    with pytest.raises(ValueError, match="only as a copy"):
        np.asarray(part.image, copy=False)
    for wrong in (3, np.array([3])):
        with pytest.raises(IndexError):
            part.image[wrong]


@pytest.mark.parametrize("block_bytes", [1, 10_000, 1 << 24])
def test_digest_in_blocks_is_that_of_the_plain_arrays(monkeypatch, block_bytes):
    """Kept teachers carry the digest of the whole arrays; blocks of 1, 3 (the last of 2) and all images give it too."""
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block_bytes)
    train, rows = plain_split(), np.random.default_rng(0).permutation(50)[:47]
    part = train.take(rows)
    whole = hashlib.sha256(train.image[rows].tobytes() + train.label[rows].tobytes()).hexdigest()
    assert images_digest(part) == images_digest(Split(*(array[rows] for array in train))) == whole
    assert images_digest(train.take(rows[::-1])) != whole
    assert [len(block) for block in blocks(part.image)] == {1: [1] * 47, 10_000: [3] * 15 + [2]}.get(block_bytes, [47])


@pytest.mark.parametrize("name", ["digits", "npz"])
def test_sizes_are_those_of_what_is_loaded(tmp_path, name):
    path = str(write_npz(tmp_path / "own.npz")) if name == "npz" else ""
    found, data = sizes(name, path=path), load(name, path=path)
    assert (found.test, found.image_shape) == (len(data.test.label), data.train.image.shape[1:])
    assert (found.num_classes, found.origin) == (data.num_classes, data.origin)
    np.testing.assert_array_equal(found.labels, data.train.label)


@pytest.mark.parametrize(
    "name, train, test, classes, largest, origin",
    [
        ("cifar100", 50_000, 10_000, 100, 500, "cifar100 as published, not read"),
        ("imagenet32", 1_281_167, 50_000, 1000, 1282, "imagenet32 as published, not read; a run needs dataset.path"),
    ],
)
def test_sizes_of_published_data_sets(name, train, test, classes, largest, origin, tmp_path):
    """Nothing of them is here."""
    found = sizes(name, data_dir=str(tmp_path))
    counts = np.bincount(found.labels)
    assert (counts.sum(), len(counts), counts.max()) == (train, classes, largest) and np.ptp(counts) <= 1
    assert (found.test, found.image_shape, found.num_classes, found.origin) == (test, (32, 32, 3), classes, origin)
    with pytest.raises(UserError, match=r"dataset\.path"):
        sizes(name, path=str(tmp_path / "absent"))
