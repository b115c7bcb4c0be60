"""Uncompressed images stay in their .npz file: the same values as read ones, and errors where the file is not whole."""

import io
import struct
import zipfile

import numpy as np
import pytest

from asib_jax.data import archives, sources

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def map_everything(monkeypatch):
    monkeypatch.setattr(archives, "_MAP_BYTES", 0)


def read(path):
    return archives.read_npz(path, ("x",), mapped=True)["x"]


def is_mapped(array):
    return isinstance(array.base, np.memmap)


def npy(array, **header):
    """The bytes of an .npy file whose header says something else."""
    file = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": array.shape} | header
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue() + array.tobytes()


def write(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("before.npy", npy(IMAGES[0]))
        file.writestr("x.npy", content)
        file.writestr("after.npy", npy(IMAGES[0]))
    return path


def test_mapped_array_is_the_read_one(tmp_path):
    """Bit by bit, wherever it lies in the file, in any shape; what wrote the file decides whether there is a map."""
    path = tmp_path / "own.npz"
    for write_as, mapped in ((np.savez, True), (np.savez_compressed, False)):
        write_as(path, x=IMAGES, rows=IMAGES.reshape(7, -1), label=np.arange(7))
        arrays = archives.read_npz(path, ("label", "x", "rows"), mapped=True)
        with np.load(path) as plain:
            for name, array in arrays.items():
                assert type(array) is np.ndarray and array.dtype == plain[name].dtype
                np.testing.assert_array_equal(array, plain[name])
        assert [is_mapped(arrays[name]) for name in ("x", "rows", "label")] == [mapped, mapped, False]
    mapped = read(write(path, npy(IMAGES)))  # in a file that numpy did not write
    np.testing.assert_array_equal(mapped, IMAGES)
    assert is_mapped(mapped) and not mapped.flags.writeable


def test_data_set_keeps_the_map(tmp_path):
    labels, path = np.arange(7), tmp_path / "own.npz"
    np.savez(path, x_train=IMAGES, y_train=labels, x_test=IMAGES, y_test=labels)
    train = sources.load("npz", path=str(path)).train
    assert is_mapped(train.image) and is_mapped(train.take(labels[3:]).image.base)
    np.testing.assert_array_equal(train.take(labels[3:]).image, IMAGES[3:])


def test_small_and_column_major_arrays_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "own.npz", npy(IMAGES, shape=IMAGES.T.shape, fortran_order=True))
    np.testing.assert_array_equal(read(path), IMAGES.T)
    assert not is_mapped(read(path))
    np.savez(path, x=IMAGES)
    monkeypatch.setattr(archives, "_MAP_BYTES", IMAGES.nbytes + 1000)
    assert not is_mapped(read(path))


@pytest.mark.parametrize(
    "content, message",
    [
        (npy(IMAGES, shape=(10**9, 8, 8, 3)), r"its shape \[1000000000, 8, 8, 3\] does not fit the 1344 bytes it has"),
        (npy(IMAGES)[:-1], r"its shape \[7, 8, 8, 3\] does not fit the 1343 bytes it has"),
        (npy(IMAGES, shape=(-7, 8, 8, 3)), r"its shape \[-7, .* does not fit"),
        (npy(IMAGES, shape=(-7, -8, 8, 3)), "negative"),
        (npy(IMAGES)[:60], "EOF"),
        (b"pixels" * 100, "magic string"),
        (npy(IMAGES, descr="|O"), "allow_pickle=False"),
    ],
)
def test_malformed_member_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"own\.npz: array x cannot be read .*{message}"):
        read(write(tmp_path / "own.npz", content))


def test_file_that_is_shorter_than_its_directory_says_is_refused(tmp_path):
    """A map beyond the end of a file would kill the process, not raise."""
    path = write(tmp_path / "own.npz", npy(np.zeros(0, np.uint8), shape=(10**6,)))
    data = bytearray(path.read_bytes())
    header = struct.unpack_from("<I", data, data.rindex(b"x.npy") - 22)[0]  # the length its directory entry gives
    struct.pack_into("<II", data, data.rindex(b"x.npy") - 26, header + 10**6, header + 10**6)  # twice
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"own\.npz is not .* all of it: its members are larger than itself"):
        read(path)


@pytest.mark.parametrize("cut", [slice(-100, None), slice(1000, 2000), slice(100, 3000)])
def test_truncated_archive_is_named(tmp_path, cut):
    path = write(tmp_path / "own.npz", npy(IMAGES))
    data = bytearray(path.read_bytes())
    del data[cut]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"own\.npz"):
        read(path)
