"""CIFAR-100 by every way, from small synthetic data in the real layouts; hostile and damaged files are refused."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from asib_jax.data import cifar100
from asib_jax.data.sources import load
from asib_jax.errors import UserError

NAMES = tuple(f"class{c:02d}" for c in range(100))
TRAIN, TEST = 7, 4  # images of either split
COARSE = 3  # a coarse label, which must not be read


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A port nobody listens on: whatever reaches for the network fails at once."""
    monkeypatch.setattr(cifar100, "URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")


def small(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, count)


def assert_is_small(data, origin):
    for split, (image, label) in ((data.train, small(TRAIN, 0)), (data.test, small(TEST, 1))):
        assert (split.image.dtype, split.label.dtype, split.index.dtype) == (np.uint8, np.int32, np.int32)
        np.testing.assert_array_equal(split.image, image)
        np.testing.assert_array_equal(split.label, label)
        np.testing.assert_array_equal(split.index, np.arange(len(label)))
        assert split.image.flags.c_contiguous
    assert data.class_names == NAMES and data.num_classes == 100 and str(origin) in data.origin


def rows(image):
    return image.transpose(0, 3, 1, 2).reshape(len(image), -1)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes both as Python 2's `str`, as the official CIFAR files have them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def python2_pickle(value):
    out = io.BytesIO()
    Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python_version(dumps=python2_pickle):
    files = {"meta": dumps({"fine_label_names": list(NAMES), "coarse_label_names": ["x"] * 20})}
    for name, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        image, label = small(count, seed)
        files[name] = dumps({"data": rows(image), "fine_labels": label.tolist(), "coarse_labels": [COARSE] * count})
    return files


def binary_version():
    files = {"fine_label_names.txt": "".join(f"{name}\n" for name in NAMES).encode()}
    for name, count, seed in (("train.bin", TRAIN, 0), ("test.bin", TEST, 1)):
        image, label = small(count, seed)
        labels = np.stack([np.full(count, COARSE), label], 1).astype(np.uint8)
        files[name] = np.concatenate([labels, rows(image)], 1).tobytes()
    return files


def write_tar(path, folder, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_folder(path, files):
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def write_npz(path):
    (x_train, y_train), (x_test, y_test) = small(TRAIN, 0), small(TEST, 1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, class_names=np.array(NAMES))
    return path


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda p: write_npz(p / "own.npz"), id="npz"),
        pytest.param(lambda p: write_tar(p / "a.tar.gz", "cifar-100-python", python_version()), id="python archive"),
        pytest.param(lambda p: write_folder(p / "cifar-100-python", python_version()), id="python folder"),
        pytest.param(lambda p: write_folder(p / "again", python_version(pickle.dumps)), id="pickled by Python 3"),
        pytest.param(lambda p: write_tar(p / "a.tar.gz", "cifar-100-binary", binary_version()), id="binary archive"),
        pytest.param(lambda p: write_folder(p / "cifar-100-binary", binary_version()), id="binary folder"),
    ],
)
def test_cifar100_from_every_kind_of_path(tmp_path, write):
    path = write(tmp_path)
    assert_is_small(load("cifar100", path=str(path)), path)


def test_cifar100_prepared_by_tfds_in_the_archives_order(tmp_path):
    builder_folder = prepare_with_tfds(tmp_path)
    assert_is_small(load("cifar100", data_dir=str(tmp_path)), builder_folder)


def prepare_with_tfds(folder, file_format="array_record"):
    """What tfds leaves behind: shuffled tf.Examples in one shard a split, with its own metadata beside them."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    builder = tfds.builder("cifar100", data_dir=folder, file_format=file_format)
    target = Path(builder.data_path)
    target.mkdir(parents=True)
    builder.info.features["label"].names = NAMES
    builder.info.features["coarse_label"].names = [f"coarse{c}" for c in range(20)]
    splits = []
    for split, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        images, labels = small(count, seed)
        shard = target / f"cifar100-{split}.{file_format}-00000-of-00001"
        writer = ArrayRecordWriter(str(shard), "group_size:1")
        for row in np.random.default_rng(2).permutation(count):
            png = io.BytesIO()
            Image.fromarray(images[row]).save(png, "PNG")
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["id"].bytes_list.value.append(f"{split}_{row:05d}".encode())
            feature["image"].bytes_list.value.append(png.getvalue())
            feature["label"].int64_list.value.append(labels[row])
            feature["coarse_label"].int64_list.value.append(COARSE)
            writer.write(example.SerializeToString())
        writer.close()
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[count],
                num_bytes=shard.stat().st_size,
                filename_template=tfds.core.naming.ShardedFileTemplate(
                    data_dir=target, dataset_name="cifar100", split=split, filetype_suffix=file_format
                ),
            )
        )
    builder.info.set_splits(tfds.core.splits.SplitDict(splits))
    builder.info.write_to_directory(target)
    return target


def test_tfds_data_in_another_format_is_named(tmp_path):
    target = prepare_with_tfds(tmp_path, "tfrecord")
    with pytest.raises(UserError, match=f"prepared by tfds: {target} is not in the format array_record"):
        load("cifar100", data_dir=str(tmp_path))


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "cifar100-train.array_record-00000-of-00001"])
def test_damaged_tfds_data_is_named(tmp_path, file):
    target = prepare_with_tfds(tmp_path)
    (target / file).write_bytes((target / file).read_bytes()[:-40])
    try:
        assert_is_small(load("cifar100", data_dir=str(tmp_path)), target)  # what tfds does not read
    except UserError as error:
        assert f"{tmp_path / 'cifar100'}, which tfds prepared, cannot be read" in str(error)
        assert file != "features.json"
    else:
        assert file == "features.json"


def test_archive_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    origin = write_tar(tmp_path / "server" / "c.tar.gz", "cifar-100-python", python_version())
    monkeypatch.setattr(cifar100, "URL", origin.as_uri())
    folder = tmp_path / "data"
    with pytest.raises(UserError, match="md5"):  # not the published digest
        load("cifar100", data_dir=str(folder))
    assert list((folder / "downloads").iterdir()) == []
    monkeypatch.setattr(cifar100, "MD5", hashlib.md5(origin.read_bytes()).hexdigest())
    kept = folder / "downloads" / "cifar-100-python.tar.gz"
    assert_is_small(load("cifar100", data_dir=str(folder)), kept)
    origin.unlink()
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))  # where to look without data_dir
    assert_is_small(load("cifar100"), kept)


def test_without_network_one_error_says_everything_within_seconds(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load("cifar100", data_dir=str(tmp_path))
    assert time.monotonic() - start < 10
    places = [str(tmp_path / "cifar100"), str(tmp_path / "downloads"), f"{cifar100.URL} cannot be reached"]
    for part in (*cifar100.WAYS, *places, "dataset.path", ":digits"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickle_never_runs_code(tmp_path):
    marker = tmp_path / "executed"
    bomb = pickle.dumps({"data": Hostile(marker)})
    for name in ("train", "meta"):
        folder = write_folder(tmp_path / name, python_version() | {name: bomb})
        with pytest.raises(ValueError, match=r"it names posix\.mkdir, which is not needed here"):
            load("cifar100", path=str(folder))
    assert not marker.exists()
    pickle.loads(bomb)  # the same bytes do run elsewhere
    assert marker.exists()


def test_damaged_files_are_named(tmp_path):
    npz = write_npz(tmp_path / "own.npz")
    npz.write_bytes(npz.read_bytes()[:-100])
    tar = write_tar(tmp_path / "cut.tar.gz", "cifar-100-python", python_version())
    tar.write_bytes(tar.read_bytes()[:2000])
    for path in (npz, tar):
        with pytest.raises(ValueError, match=path.name):
            load("cifar100", path=str(path))


def test_folder_without_cifar_says_what_it_lacks(tmp_path):
    files = python_version()
    del files["meta"]
    with pytest.raises(ValueError, match="neither train, test, meta .* of these it holds test, train"):
        load("cifar100", path=str(write_folder(tmp_path / "part", files)))
    broken = python_version() | {"test": pickle.dumps({"data": np.zeros((2, 5), np.uint8), "fine_labels": [0, 1]})}
    with pytest.raises(ValueError, match=r"not CIFAR-100 as published.*data of test .*found \[2, 5\]"):
        load("cifar100", path=str(write_folder(tmp_path / "broken", broken)))
