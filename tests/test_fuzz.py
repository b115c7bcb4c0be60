"""Readers of files that others wrote, and of the configuration: whatever they get, they read it or raise UserError.

Short here; `pytest -m slow tests/test_fuzz.py` tries many times as much, each time something else.
"""

import collections
import copy
import functools
import io
import json
import os
import pathlib
import pickle
import tarfile
import tempfile
from collections import OrderedDict
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from networks import SHALLOW, make_networks
from safetensors.numpy import save
from test_cifar100 import binary_version, python2_pickle, python_version
from test_torch_pickle import VALUES, tensor, write_stream, write_zip

from asib_jax import recipe
from asib_jax.data import sources
from asib_jax.engine import bank_files
from asib_jax.errors import UserError
from asib_jax.recipe import checks
from asib_jax.record import finished
from asib_jax.record.experiment import Record
from asib_jax.weights import origins
from configs import base, l4_full

SHORT = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
LONG = SHORT | {"derandomize": False, "phases": (Phase.generate, Phase.shrink)}
LONGER = 20  # times as many examples


def fuzz(examples: int, **strategies):
    """A test over the strategies, and the same again, slow, with LONGER times as many examples.

    It takes a folder and what is drawn, and gives None where that was refused.
    """

    def decorate(test):
        @pytest.mark.parametrize("factor", [1, pytest.param(LONGER, marks=pytest.mark.slow)], ids=["short", "long"])
        def run(factor, folder):
            count = collections.Counter()

            def once(**drawn):
                count["examples"] += 1
                count["refused"] += test(folder, **drawn) is None

            once = given(**strategies)(once)
            settings(**(SHORT if factor == 1 else LONG), max_examples=examples * factor)(once)()
            print(f"{test.__name__}: {dict(count)}")

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# --- files -----------------------------------------------------------------------------------------------------------


@functools.cache
@mock.patch("time.time", lambda: 1e9)  # or archives would differ from run to run
def contents() -> dict[str, bytes]:
    """Valid files of every kind, by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        arrays = {"a.weight": VALUES, "b.bias": np.arange(4).reshape(2, 2), "c": np.array(["x", "yz"])}
        np.savez(folder / "stored.npz", **arrays)
        np.savez_compressed(folder / "packed.npz", **arrays)
        state = OrderedDict(w=tensor(), s=tensor(offset=1, size=(2, 2), stride=(1, 2)))
        write_zip(folder / "zip.pth", state)
        write_stream(folder / "stream.bin", {"state_dict": state, "epoch": 3})
        small = {
            "x_train": np.zeros((3, 2, 2, 1), np.uint8),
            "x_test": np.ones((2, 2, 2, 1), np.uint8),
            "y_train": np.array([0, 1, 2]),
            "y_test": np.array([1, 0]),
        }
        np.savez(folder / "data.npz", **small)
        np.savez_compressed(folder / "named.npz", **small, class_names=np.array(["a", "b", "c"]))
        np.savez(folder / "part.npz", data=np.zeros((2, 3072), np.uint8), labels=np.array([1, 1000], np.uint16))
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files["w.safetensors"] = save({"a": VALUES, "b": np.arange(4, dtype=np.int8).reshape(2, 2)})
    files |= {f"python/{name}": content for name, content in python_files(python2_pickle).items()}
    files |= {f"python3/{name}": content for name, content in python_files(pickle.dumps).items()}
    files |= {f"binary/{name}": content for name, content in binary_version().items()}
    files["plain.tar"] = tar(python_files(python2_pickle), "w:")
    files["packed.tar.gz"] = tar(python_files(python2_pickle), "w:gz")
    files["binary.tar"] = tar(binary_version(), "w:", "cifar-100-binary")
    return files | {f"picture.{kind}": picture(kind) for kind in FORMATS}


def python_files(dumps) -> dict[str, bytes]:
    """Of one image, so that what is damaged is more than pixels."""
    small = dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [5], "coarse_labels": [1]})
    return python_version(dumps) | {"train": small, "test": small}


def tar(files: dict[str, bytes], mode: str, folder: str = "cifar-100-python") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "ppm": "PPM"}


def picture(kind: str) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(levels).save(
        out, FORMATS[kind], **({"exif": exif} if kind in ("jpg", "png", "webp", "tif") else {})
    )
    return out.getvalue()


@st.composite
def damaged(draw, *names: str) -> tuple[str, bytes]:
    """One of these files with some bytes changed, left out, repeated or put in, cut short, or random from the start."""
    name = draw(st.sampled_from(names))
    content = bytearray(contents()[name])
    if draw(st.integers(0, 19)) == 0:
        return name, bytes(content[: draw(st.integers(0, 16))]) + draw(st.binary(max_size=300))
    where = st.integers(0, len(content))
    if draw(st.booleans()):  # most formats keep what matters at their ends
        where = st.one_of(st.integers(0, min(400, len(content))), st.integers(max(0, len(content) - 700), len(content)))
    for _ in range(draw(st.integers(1, 4))):
        kind, at = draw(st.sampled_from(("bit", "byte", "number", "cut", "drop", "insert", "repeat"))), draw(where)
        if kind == "bit" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif kind == "number":
            content[at : at + 4] = draw(
                st.sampled_from((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0"))
            )
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            start = draw(where)
            content[at:at] = content[start : start + draw(st.integers(1, 128))]
    return name, bytes(content)


def only_user_errors(reader, *arguments, **options):
    """What the reader gives, or None."""
    try:
        return reader(*arguments, **options)
    except UserError as error:
        assert str(error)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def checked(data):
    """The data set. What came through is as a data set has to be: damage must not go on as data."""
    if data is not None:
        for split in (data.train, data.test):
            assert split.image.dtype == np.uint8 and split.image.ndim == 4 and len(split.image) == len(split.label) > 0
            assert split.label.min() >= 0 and split.label.max() < data.num_classes
    return data


@fuzz(400, drawn=damaged("stored.npz", "packed.npz", "zip.pth", "stream.bin", "w.safetensors"))
def test_weights(folder, drawn):
    name, content = drawn
    (folder / name).write_bytes(content)
    arrays = only_user_errors(origins.load, folder / name)
    assert arrays is None or all(isinstance(array, np.ndarray) for array in arrays.values())
    return arrays


@fuzz(200, drawn=damaged("data.npz", "named.npz"))
def test_npz(folder, drawn):
    name, content = drawn
    (folder / name).write_bytes(content)
    return checked(only_user_errors(sources.load, "npz", path=str(folder / name)))


@fuzz(100, drawn=damaged("part.npz"), place=st.sampled_from(("train_data_batch_1", "train_data_batch_2", "val_data")))
def test_imagenet32(folder, drawn, place):
    source = folder / "imagenet32"
    source.mkdir(exist_ok=True)
    for part in ("train_data_batch_1", "train_data_batch_2", "val_data"):
        (source / f"{part}.npz").write_bytes(drawn[1] if part == place else contents()["part.npz"])
    return checked(only_user_errors(sources.load, "imagenet32", path=str(source)))


@fuzz(300, drawn=damaged("plain.tar", "packed.tar.gz", "binary.tar"))
def test_cifar100_archives(folder, drawn):
    name, content = drawn
    (folder / name).write_bytes(content)
    return checked(only_user_errors(sources.load, "cifar100", path=str(folder / name)))


@fuzz(
    400,
    drawn=damaged(
        *(f"{kind}/{name}" for kind in ("python", "python3") for name in ("train", "test", "meta")),
        *(f"binary/{name}" for name in ("train.bin", "test.bin", "fine_label_names.txt")),
    ),
)
def test_cifar100_folders(folder, drawn):
    name, content = drawn
    kind = name.partition("/")[0]
    for other, whole in contents().items():
        if other.startswith(f"{kind}/"):
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_bytes(content if other == name else whole)
    return checked(only_user_errors(sources.load, "cifar100", path=str(folder / kind)))


@fuzz(400, drawn=damaged(*(f"picture.{kind}" for kind in FORMATS)), image_size=st.sampled_from([0, 3]))
def test_pictures(folder, drawn, image_size):
    name, content = drawn
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            place = folder / name / split / label
            place.mkdir(parents=True, exist_ok=True)
            (place / f"whole{name}").write_bytes(contents()[name])
        (place / name).write_bytes(content)
    return checked(only_user_errors(sources.load, "folder", path=str(folder / name), image_size=image_size))


@functools.cache
def bank_file() -> bytes:
    out = io.BytesIO()
    np.savez(
        out,
        logits=np.zeros((3, 2, 5), np.float32),
        teacher1=np.zeros((3, 12), np.uint8),
        teacher2=np.zeros((3, 16), np.uint8),
    )
    return out.getvalue()


@functools.cache
def nets():
    return make_networks(**SHALLOW)


@fuzz(100, at=st.integers(0, 2000), change=st.binary(max_size=8), dropped=st.integers(0, 64))
def test_stored_outputs(folder, at, change, dropped):
    content = bytearray(bank_file())
    content[at : at + dropped] = change
    (folder / "bank.npz").write_bytes(content)
    return only_user_errors(bank_files.load, folder / "bank.npz", nets())


# --- configurations --------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from((0, 1, -1, 2**31, 2**63, 2**70, 1e308, 1e-320, float("inf"), float("nan"), "", "~"))
)
VALUES_OF_ANY_TYPE = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


def keys(config: dict, prefix: str = "") -> list[str]:
    """Every key and every group's name, dotted."""
    return [
        name
        for key, value in config.items()
        for name in [prefix + key, *(keys(value, f"{prefix}{key}.") if isinstance(value, dict) else ())]
    ]


CONFIGS = [base.get_config().to_dict(), l4_full.get_config("digits").to_dict()]
LIKE = {
    name: value
    for config in CONFIGS
    for name, value in ((key, functools.reduce(dict.__getitem__, key.split("."), config)) for key in keys(config))
}


@st.composite
def override(draw) -> tuple[str, object]:
    """A key, mostly one that exists, and a value, mostly of its type."""
    known = draw(st.sampled_from(sorted(LIKE)))
    key = draw(st.just(known) | st.just(known) | st.just(known) | st.text(max_size=12))
    by_type = {
        bool: st.booleans(),
        int: st.integers(-3, 40) | st.integers(),
        float: st.floats() | st.floats(0, 4),
        str: st.text(max_size=12) | st.sampled_from(sorted(v for v in LIKE.values() if isinstance(v, str))),
        tuple: st.lists(st.integers(-2, 9) | st.floats(0, 9), max_size=4).map(tuple),
    }
    alike = by_type.get(type(LIKE[known]), VALUES_OF_ANY_TYPE)
    return key, draw(alike | alike | VALUES_OF_ANY_TYPE)


@fuzz(
    300,
    number=st.integers(0, 1),
    changes=st.lists(override(), min_size=1, max_size=4),
    dropped=st.none() | st.none() | st.none() | st.sampled_from(sorted(LIKE)),
)
def test_configurations(folder, number, changes, dropped):
    """Changed anywhere, to anything; one key may be missing. What is read and checked then describes a run."""
    config = copy.deepcopy(CONFIGS[number])
    for key, value in changes:
        *groups, leaf = key.split(".")
        group = config
        for name in groups:
            group = group.get(name, {}) if isinstance(group, dict) else {}
        if isinstance(group, dict):
            group[leaf] = value
    if dropped:
        *groups, leaf = dropped.split(".")
        group = functools.reduce(
            lambda group, name: group.get(name, {}) if isinstance(group, dict) else {}, groups, config
        )
        if isinstance(group, dict):
            group.pop(leaf, None)
    read = only_user_errors(recipe.read, config)
    if read is not None:
        only_user_errors(checks.check, read)
    return read


@fuzz(300, value=VALUES_OF_ANY_TYPE | st.dictionaries(SCALARS, SCALARS, max_size=2))
def test_configurations_that_are_none(folder, value):
    return only_user_errors(recipe.read, value)


@fuzz(200, at=st.integers(0, 4000), change=st.binary(max_size=8), dropped=st.integers(0, 4000))
def test_damaged_run_folders(folder, at, change, dropped):
    content = bytearray(json.dumps(CONFIGS[1]).encode())
    content[at : at + dropped] = change
    (folder / "config.json").write_bytes(content)
    return only_user_errors(finished.read_recipe, folder)


@fuzz(
    300,
    exp_id=st.text(max_size=12)
    | st.sampled_from(
        (".", "..", "latest", "summary.csv", "teachers", "x" * 300, "/", "a/b", "a\0", ".x", "latest.txt")
    ),
)
def test_names_of_runs(folder, exp_id):
    """Only ever a new folder in results_dir."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        results = pathlib.Path(name) / "results"
        record = only_user_errors(Record.create, results, "name", exp_id, {"seed": 0})
        assert os.listdir(name) in ([], ["results"])
        assert record is None or (record.folder.parent == results and len(os.listdir(results)) == 1)
        if record is not None:
            record.finish("finished", {})
    return record


PARTS = st.sampled_from(
    ("hf:", "me", "net", "/", "@", "main", "..", ".", "~", "\0", " ", "w.npz", "refs/pr/1", "-", "--", "é", "x" * 100)
) | st.text(max_size=4)


@fuzz(400, reference=st.lists(PARTS, max_size=8).map("".join), prefix=st.sampled_from(("hf:", "hf:me/net", "")))
def test_references_of_weights(folder, reference, prefix):
    return only_user_errors(origins.cached, prefix + reference)
