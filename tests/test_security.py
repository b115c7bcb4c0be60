"""A file is data: nothing in it is run, followed or believed. The attacks here work on careless readers."""

import ast
import copyreg
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest
from test_cifar100 import binary_version, python_version, write_folder, write_tar

from asib_jax.data import archives, sources
from asib_jax.errors import UserError
from asib_jax.weights import origins, torch_pickle

ROOT = pathlib.Path(__file__).resolve().parents[1]

# --- the code --------------------------------------------------------------------------------------------------------

RUNS = {"eval", "exec", "compile", "__import__"}  # what Python calls without an import
LOADERS = {"pickle", "np", "numpy", "torch", "yaml"}  # whose load and loads may run what they read
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "cPickle", "pickle"}
ATTRIBUTES = {"extractall", "extract", "unpack_archive", "import_module", "system", "popen", "literal_eval"}
PICKLES = "plain_pickle.py"  # the one file that may know them


def running(source: str) -> list[str]:
    """What in a program would run, unpack or unpickle a file that it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in RUNS:
            found.append(node.id)
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in ATTRIBUTES or (owner in LOADERS and node.attr in ("load", "loads", "Unpickler")):
                found.append(f"{owner}.{node.attr}")
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module in MODULES or node.module in LOADERS | {"importlib"}):
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if node.module in MODULES or alias.name in ("load", "import_module")
            ]
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell", "weights_only"):
            found.append(node.arg)
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "Image.open"
            and "formats" not in {keyword.arg for keyword in node.keywords}
        ):
            found.append("Image.open without formats")
    return found


OWN_FILES = {name: ["runpy"] for name in ("shipped.py", "__main__.py")}  # they run the shipped configs and scripts


def test_no_code_runs_a_file():
    for folder in ("asib_jax", "launch", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            found = running(path.read_text())
            assert found == {PICKLES: ["pickle"], **OWN_FILES}.get(path.name, []), path


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "f = exec",
        "compile(x, '', 'exec')",
        "__import__('os')",
        "import pickle",
        "from pickle import loads",
        "import os\nos.system(x)",
        "np.load(x)",
        "numpy.load(x)",
        "torch.load(x)",
        "from numpy import load",
        "f(x, allow_pickle=False)",
        "f(x, shell=True)",
        "tar.extractall(x)",
        "shutil.unpack_archive(x)",
        "importlib.import_module(x)",
        "from importlib import import_module",
        "Image.open(x)",
        "import joblib",
        "pickle.loads",
    ],
)
def test_code_that_would_is_found(source):
    assert running(source)


# --- pickles ---------------------------------------------------------------------------------------------------------


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    """The opcode for a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which takes attributes of attributes since protocol 4."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def working(marker: str) -> dict[str, bytes]:
    """Pickles, without STOP, of which each makes the file `marker` when the standard library reads it."""
    touch, python = text(f"touch {marker}"), text(f"open({marker!r}, 'w').close()")
    evil = pathlib.Path(marker).with_name("evil.npy")
    np.save(evil, np.array([Call(os.system, f"touch {marker}")], object), allow_pickle=True)
    attacks = {
        f"os.system, protocol {protocol}": pickle.dumps(Call(os.system, f"touch {marker}"), protocol)[:-1]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    }
    return attacks | {
        "os.system by name": called(b"cos\nsystem\n", touch),
        "eval": called(b"cbuiltins\neval\n", python),
        "exec": called(b"cbuiltins\nexec\n", python),
        "eval of Python 2": called(b"c__builtin__\neval\n", python),
        "subprocess": called(b"csubprocess\ncheck_call\n", b"]" + text("touch") + b"a" + text(marker) + b"a"),
        "pathlib.Path.touch": called(named("pathlib", "Path.touch"), called(b"cpathlib\nPosixPath\n", text(marker))),
        "os behind numpy": called(named("numpy", "lib._datasource.os.system"), touch),
        "os behind collections": called(named("collections", "_sys.modules.__class__.__base__.__subclasses__"))
        + b"0"
        + called(b"cos\nsystem\n", touch),
        "numpy.load": called(b"cnumpy\nload\n", text(str(evil)), b"N", b"\x88"),
        "numpy.memmap": called(b"cnumpy\nmemmap\n", text(marker), text("u1"), text("w+"), b"K\x00", b"K\x01"),
        "ndarray.tofile": called(named("numpy", "ndarray.tofile"), ARRAY, text(marker)),
        "a call in an array's state": ARRAY
        + b"(K\x01(K\x01tcnumpy\ndtype\n("
        + text("O")
        + b"K\x00K\x01tR\x89]"
        + called(b"cos\nsystem\n", touch)
        + b"atb",
        "a call in a call of what is allowed": called(
            b"cnumpy\ndtype\n", called(b"cos\nsystem\n", touch) + b"0" + text("u1"), b"K\x00", b"K\x01"
        ),
        "a call in a dictionary's key": b"}" + called(b"cos\nsystem\n", touch) + b"K\x01s",
        "INST": b"(" + touch + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + touch + b"o",
        "EXT1": called(b"\x82\xc8", touch),
        "EXT2": called(b"\x83\xc8\x00", touch),
        "EXT4": called(b"\x84\xc8\x00\x00\x00", touch),
    }


def harmless(marker: str) -> dict[str, bytes]:
    """Pickles, without STOP, that ask for what plain data does not: whatever comes of them, it is an error here."""
    return {
        "NEWOBJ": b"csubprocess\nPopen\n)\x81",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n)}\x92",
        "getattr": called(b"cbuiltins\ngetattr\n", b"ccollections\nOrderedDict\n", text("fromkeys")),
        "sets": b"\x80\x04\x8f",
        "bytearray": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x",
        "a persistent id": text("x") + b"Q",
        "a persistent id as text": b"Px\n",
        "state of a class": b"cnumpy\ndtype\n}" + text("dtype") + b"K\x01sb",
        "state of a class, by slots": b"ccollections\nOrderedDict\nN}" + text("__setitem__") + b"K\x01s\x86b",
        "state of a function": TENSOR + b"N}" + text("__defaults__") + b"K\x01K\x02\x86s\x86b",
        "state of a list": b"]}" + text("append") + b"K\x01sb",
        "objects in an array": ARRAY + b"(K\x01(K\x01tcnumpy\ndtype\n(" + text("O8") + b"K\x00K\x01tR\x89]Natb",
        "a class that is called later": called(b"cnumpy\nndarray\n", b"(J\xff\xff\xff\x7ft"),
        "unknown opcode": b"\xff",
    }


def whole(attack: bytes) -> list[bytes]:
    """An attack as a pickle, and within others."""
    return [
        attack + b".",
        b"}" + text("data") + attack + b"s.",
        b"}" + text("fine_labels") + b"]" + attack + b"as.",
        b"](" + attack + b"e.",
    ]


def files_of(content: bytes, folder: pathlib.Path):
    """(reader, path) of files that hold a pickle of these bytes, of each kind and in each place."""
    for name in ("train", "meta"):
        cifar = folder / f"cifar_{name}"
        shutil.rmtree(cifar, ignore_errors=True)
        yield archives.read_cifar100, write_folder(cifar, python_version(pickle.dumps) | {name: content})
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("any/data.pkl", content)
        archive.writestr("any/data/0", b"\0" * 8)
    yield torch_pickle.read, folder / "zip.pth"
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    for place in range(4):
        (folder / "stream.pth").write_bytes(b"".join([*head[:place], content, *head[place + 1 :]]))
        yield torch_pickle.read, folder / "stream.pth"


@pytest.fixture
def extension():
    """Code 200 of the registry of extensions is os.system, as some library could have it."""
    copyreg.add_extension("os", "system", 200)
    yield
    copyreg.remove_extension("os", "system", 200)


def test_no_pickle_runs_anything(tmp_path, extension):
    """In place of every pickle of CIFAR-100's Python version and of both of PyTorch's formats.

    Each works elsewhere, and is tried after it did: the standard library looks up no extension twice.
    """
    marker, folder = tmp_path / "ran", tmp_path / "files"
    folder.mkdir()
    attacks = working(str(marker))
    for name, attack in attacks.items():
        pickle.loads(attack + b".")
        assert marker.exists(), f"{name} is no attack"
        marker.unlink()
    for name, attack in (attacks | harmless(str(marker))).items():
        for content in whole(attack):
            for reader, path in files_of(content, folder):
                with pytest.raises(UserError):
                    reader(path)
                assert not marker.exists(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.npy", "files"]


def test_no_pickle_changes_how_the_next_is_read(tmp_path):
    """After all attacks. The classes and functions that stand for those of a format are one for all files."""
    folder = write_folder(tmp_path / "cifar", python_version())
    before = archives.read_cifar100(folder)
    for attack in (working(str(tmp_path / "ran")) | harmless("")).values():
        for reader, path in files_of(attack + b".", tmp_path):
            with pytest.raises(UserError):
                reader(path)
    for name, array in archives.read_cifar100(folder).items():
        np.testing.assert_array_equal(array, before[name])


# --- archives --------------------------------------------------------------------------------------------------------


def tar_of(path, *members):
    """A .tar.gz of (name, type, content or target of a link)."""
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                tar.addfile(info)
    return path


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_what_is_no_file_in_a_tar_archive_is_not_followed(tmp_path, kind):
    """A link to a file that is right, here or in the archive; a device; a pipe."""
    files = binary_version()
    target = write_folder(tmp_path / "elsewhere", files) / "train.bin"
    members = [(f"cifar-100-binary/{name}", tarfile.REGTYPE, content) for name, content in files.items()]
    assert len(archives.read_cifar100(tar_of(tmp_path / "right.tar.gz", *members))["x_train"]) == 7
    name, content = members[1][0], members[1][2]
    link = "kept" if kind == tarfile.LNKTYPE else str(target)
    members[1:2] = [("kept", tarfile.REGTYPE, content), (name, kind, link)]
    with pytest.raises(UserError, match="holds neither"):
        archives.read_cifar100(tar_of(tmp_path / "link.tar.gz", *members))


@pytest.mark.parametrize(
    "prefix",
    [
        "../",
        "/",
        "cifar-100-python/../",
        "../../cifar-100-python/",
        "x/../",
        "cifar-100-python//",
        "/cifar-100-python/",
        "..\\cifar-100-python\\",
    ],
)
def test_no_name_in_a_tar_archive_leads_anywhere(tmp_path, prefix):
    """Only `cifar-100-python/train` is it; nothing is written; of a folder and its parents nothing else is read."""
    path = tar_of(
        tmp_path / "a.tar.gz",
        *((prefix + name, tarfile.REGTYPE, content) for name, content in python_version().items()),
    )
    with pytest.raises(UserError, match="of these it holds nothing"):
        archives.read_cifar100(path)
    assert list(tmp_path.iterdir()) == [path] and not pathlib.Path("/train").exists()


def test_a_name_in_an_npz_is_only_a_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("../x", "/x", "x"):
            content = io.BytesIO()
            np.save(content, np.arange(3))
            archive.writestr(f"{name}.npy", content.getvalue())
    assert set(origins.load(tmp_path / "a.npz")) == {"../x", "/x", "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("size", [-512, -1, 1 << 40])
def test_a_tar_archive_with_an_impossible_size_ends(tmp_path, size):
    """A negative one leads tarfile back to the member it comes from, for ever (CVE-2025-8194)."""
    info = tarfile.TarInfo("cifar-100-python/train")
    info.size = size
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = info.tobuf(form)
        (tmp_path / "a.tar").write_bytes(header + bytes(1024))
        with pytest.raises(UserError):
            archives.read_cifar100(tmp_path / "a.tar")


# --- pictures --------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_picture_is_what_it_is_called(tmp_path, monkeypatch):
    """PostScript, a language that programs are written in, Pillow gives to Ghostscript, whatever the file's name."""
    from PIL import EpsImagePlugin, Image

    marker, binaries = tmp_path / "ran", tmp_path / "bin"
    binaries.mkdir()
    (binaries / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (binaries / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # look for it again
    for split in ("train", "test"):
        picture = tmp_path / "data" / split / "cat" / "a.png"
        picture.parent.mkdir(parents=True)
        picture.write_bytes(EPS)
    with pytest.raises(UserError, match=r"train/cat/a\.png cannot be read as a picture"):
        sources.load("folder", path=str(tmp_path / "data"))
    assert not marker.exists()
    with pytest.raises(Exception), Image.open(picture) as image:  # noqa: B017  # Ghostscript's, of no one kind
        image.load()
    assert marker.exists()


def png(width, height, content=b""):
    """A grey picture's header, and then `content` as its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


# --- sizes -----------------------------------------------------------------------------------------------------------


def npy(header: dict, content: bytes = b"", version=(1, 0)) -> bytes:
    file = io.BytesIO()
    if version == (1, 0):
        np.lib.format.write_array_header_1_0(file, header)
    else:
        np.lib.format.write_array_header_2_0(file, header)
    return file.getvalue() + content


def shape_of(shape, descr="|u1"):
    return {"descr": descr, "fortran_order": False, "shape": shape}


def npz(path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def zip_bombs(folder):
    """name -> path of .npz files that state more than they have, or have more than a file should unpack to."""
    pixels = npy(shape_of((4 << 20,)), bytes(4 << 20))
    files = {
        "a shape": npz(folder / "a.npz", x=npy(shape_of((1 << 40,)))),
        "a shape of shapes": npz(folder / "b.npz", x=npy(shape_of((1 << 62, 1 << 62, 0, 4), "<f8"), b"1234")),
        "wide elements": npz(folder / "c.npz", x=npy(shape_of((1,), "<U1000000000"))),
        "wide voids": npz(folder / "d.npz", x=npy(shape_of((1,), "|V1000000000"))),
        "elements of nothing": npz(folder / "e.npz", x=npy(shape_of((1 << 40,), "<U0"))),
        "a long header": npz(folder / "f.npz", x=b"\x93NUMPY\x02\x00\xff\xff\xff\xff"),
        "a deep header": npz(folder / "g.npz", x=b"\x93NUMPY\x01\x00\xf0\x0f" + b"(" * 0xFF0),
        "zeros": npz(folder / "h.npz", zipfile.ZIP_DEFLATED, x=npy(shape_of((256 << 20,)), bytes(256 << 20))),
    }
    sized = bytearray(npz(folder / "i.npz", zipfile.ZIP_DEFLATED, x=pixels).read_bytes())
    struct.pack_into("<I", sized, sized.rindex(b"x.npy") - 22, 0xFFFFFFF0)  # the size in the directory
    (folder / "i.npz").write_bytes(sized)
    with zipfile.ZipFile(folder / "j.npz", "w") as archive:
        archive.writestr("0.npy", pixels)
        archive.filelist += [zipfile.ZipInfo(f"{k}.npy") for k in range(1, 50)]
        for member in archive.filelist[1:]:
            first = archive.filelist[0]
            member.header_offset, member.CRC = first.header_offset, first.CRC
            member.compress_size, member.file_size = first.compress_size, first.file_size
    return files | {"a size in the directory": folder / "i.npz", "members that overlap": folder / "j.npz"}


def doubled(before: bytes, after: bytes, times: int = 60) -> bytes:
    """A part of a pickle, a few bytes long `times` times, of what has 2 ** times elements if written out.

    before, after: the opcodes for [x, x] around the two.
    """
    value = b"K\x01"
    for k in range(times):
        value = before + value + b"q" + bytes([k]) + b"h" + bytes([k]) + after
    return value


LISTS, TUPLES = (b"](", b"e"), (b"", b"\x86")
DEEP = 150_000
PICKLE_BOMBS = {
    "doubled lists": doubled(*LISTS),
    "doubled tuples": doubled(*TUPLES),
    "doubled tuples as a key": b"}" + doubled(*TUPLES) + b"K\x01s",
    "doubled tuples as a key of protocol 0": b"(" + doubled(*TUPLES) + b"K\x01d",
    "doubled tuples as a key of an OrderedDict": b"ccollections\nOrderedDict\n(](" + doubled(*TUPLES) + b"K\x01\x86etR",
    "deep lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "deep tuples": b")" + b"\x85" * DEEP,
    "deep tuples as a key": b"})" + b"\x85" * DEEP + b"K\x01s",
    "deep tuples as an id": b")" + b"\x85" * DEEP + b"Q",
    "deep tuples as a storage": TENSOR + b"()" + b"\x85" * DEEP + b"K\x00))\x89)tR",
    "doubled tuples as sizes": TENSOR + b"(" + text("0") + b"K\x00" + doubled(*TUPLES) + doubled(*TUPLES) + b"\x89)tR",
    "a dictionary of the same long list, again and again": b"(]("
    + b"".join(b"M" + struct.pack("<H", k) + b"N\x86" for k in range(20_000))
    + b"eq\x00"
    + b"ccollections\nOrderedDict\nq\x01"
    + b"h\x01h\x00\x85R" * 500
    + b"l",
    "a tensor of the same long sizes, again and again": b"(("
    + b"K\x01" * 20_000
    + b"tq\x00"
    + TENSOR
    + b"q\x01"
    + text("0")
    + b"q\x02"
    + b"h\x01(h\x02K\x00h\x00h\x00NNtR" * 20_000
    + b"l",
    "bytes": b"\x8e" + struct.pack("<Q", 1 << 36) + b"x",
    "text": b"\x8d" + struct.pack("<Q", 1 << 36) + b"x",
    "text of Python 2": b"T" + struct.pack("<i", 1 << 30) + b"x",
    "a number": b"\x8b" + struct.pack("<i", 1 << 30) + b"x",
    "a number in digits": b"L" + b"9" * 1_000_000 + b"L\n",
    "a frame": b"\x95" + struct.pack("<Q", 1 << 36) + b"x",
    "the memo": b"Nr" + struct.pack("<I", 1 << 27),
    "an array's shape": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\0\0\0\x40tC\x01BtR",
    "an array": called(b"cnumpy\nndarray\n", b"(J\0\0\0\x40t", text("f8")),
    "a type": called(b"cnumpy\ndtype\n", text("V1000000000"), b"K\x00", b"K\x01"),
    "the state of an array": ARRAY + b"(K\x01(J\0\0\0\x40tcnumpy\ndtype\n(" + text("u1") + b"K\x00K\x01tR\x89C\x01xtb",
}


def torch_bombs(folder):
    """name -> path of PyTorch files that state more than they have."""

    def data(size, stride, numel):
        storage = b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + numel + b"tQ"
        return b"}" + text("w") + TENSOR + storage + b"K\x00(" + size + b"t(" + stride + b"t\x89)tRs."

    huge, six = b"\x8a\x06" + (1 << 40).to_bytes(6, "little"), b"K\x06"
    contents = {
        "elements that are repeated": data(huge, b"K\x00", six),
        "elements of a storage": data(huge, b"K\x01", huge),
    }
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    files = {}
    for name, content in contents.items():
        files[name] = folder / f"{len(files)}.pth"
        with zipfile.ZipFile(files[name], "w") as archive:
            archive.writestr("any/data.pkl", content)
            archive.writestr("any/data/0", b"\0" * 24)
        files[f"{name}, in a stream"] = folder / f"{len(files)}.pth"
        count = 6 if "repeated" in name else 1 << 40
        files[f"{name}, in a stream"].write_bytes(
            head + content + pickle.dumps(["0"], 2) + count.to_bytes(8, "little") + b"\0" * 24
        )
    return files


def safetensors_bombs(folder):
    header = b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    contents = {
        "a header": struct.pack("<Q", 1 << 62) + b"{}",
        "a large header": struct.pack("<Q", 99 << 20) + b"{}",
        "a shape": struct.pack("<Q", len(header)) + header,
    }
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return {name: folder / f"{name}.safetensors" for name in contents}


def cifar_bombs(folder):
    files = python_version(pickle.dumps)
    wide = pickle.dumps({"fine_label_names": ["x" * (1 << 18)] + ["x"] * 999})
    labels = pickle.dumps({"data": np.zeros((1, 3072), np.uint8)})[:-1]
    labels += text("fine_labels") + doubled(*LISTS, 27) + b"s."
    binary = binary_version() | {"fine_label_names.txt": b"x" * (1 << 18) + b" x" * 999}
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 36
    (folder / "name.tar").write_bytes(name.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    sparse = tarfile.TarInfo("cifar-100-python/train")
    sparse.type, header = tarfile.GNUTYPE_SPARSE, bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[483:495] = b"S", b"07777777777\0"  # its type and its size with holes
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    (folder / "sparse.tar").write_bytes(bytes(header) + bytes(1024))
    return {
        "doubled labels": write_folder(folder / "labels", files | {"train": labels}),
        "a wide name": write_folder(folder / "wide", files | {"meta": wide}),
        "a wide name, binary": write_folder(folder / "wide_binary", binary),
        "zeros in a tar archive": write_tar(folder / "zeros.tar.gz", "cifar-100-python", {"x": bytes(200 << 20)}),
        "a long name in a tar archive": folder / "name.tar",
        "holes in a tar archive": folder / "sparse.tar",
    }


def data_bombs(folder):
    """(name of the source, name) -> path."""
    image = np.zeros((2, 4, 4, 1), np.uint8)
    np.savez(folder / "label.npz", x_train=image, x_test=image, y_train=np.array([0, 1 << 40]), y_test=np.array([0, 1]))
    files = {("npz", "a label"): folder / "label.npz"}
    for name, content in {
        "a picture's size": png(60_000, 60_000),
        "a size below Pillow's bound": png(9000, 9000),
        "zeros in a picture": png(8000, 8000, bytes(8001 * 8000)),
        "a wide WebP": picture("WEBP", (16383, 16383), lossless=True, method=0),
        "a wide GIF": picture("GIF", (8000, 8000)),
        "a wide TIFF": picture("TIFF", (8000, 8000), compression="tiff_adobe_deflate"),
    }.items():
        for split in ("train", "test"):
            target = folder / name / split / "cat"
            target.mkdir(parents=True)
            for k in range(9):
                (target / f"{k}.png").write_bytes(content)
        files["folder", name] = files["resized", name] = folder / name
    return files


def picture(kind, size, **options):
    """One level throughout."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", size).save(file, kind, **options)
    return file.getvalue()


READERS = {
    "weights": origins.load,
    "cifar100": archives.read_cifar100,
    **{name: lambda path, name=name: sources.load(name, path=str(path)) for name in ("npz", "folder")},
    "resized": lambda path: sources.load("folder", path=str(path), image_size=8),
}


def bombs(folder):
    """(name, reader, path) of every bomb."""
    for kind, written in (("npz", zip_bombs), ("pth", torch_bombs), ("safetensors", safetensors_bombs)):
        yield from ((f"{kind}: {name}", "weights", path) for name, path in written(folder).items())
    yield from ((f"cifar100: {name}", "cifar100", path) for name, path in cifar_bombs(folder).items())
    yield from ((f"{source}: {name}", source, path) for (source, name), path in data_bombs(folder).items())
    for name, attack in PICKLE_BOMBS.items():
        for number, content in enumerate(whole(attack)[:2]):
            place = folder / f"{name} {number}"
            place.mkdir()
            for path in {path: None for _, path in files_of(content, place)}:
                yield f"pickle: {name}", "weights" if path.suffix == ".pth" else "cifar100", path


def memory(what: str) -> int:
    """Bytes of this process, from the kernel."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(f"{what}:"))
    return int(line.split()[1]) << 10


def measure(listed: str) -> None:
    """Prints, after each bomb, the seconds it took, the MiB asked for since the first, and its message's length."""
    archives._ANYWAY, archives._CIFAR_BYTES = 32 << 20, 32 << 20  # smaller, so that bombs can be
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (3 << 30),) * 2)
    start = memory("VmPeak")
    for name, reader, path in json.loads(pathlib.Path(listed).read_text()):
        began = time.perf_counter()
        with pytest.raises(UserError) as error:
            READERS[reader](pathlib.Path(path))
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps([name, seconds, (memory("VmPeak") - start) >> 20, len(str(error.value))]), flush=True)


def test_no_file_takes_more_memory_than_it_is_worth(tmp_path):
    """Neither touched nor only asked for, as the kernel counts: 120 MiB, with bounds of 32 MiB on what is unpacked.

    In a process of its own, which nothing ends: a deep tuple ends a careless reader by a segmentation fault.
    """
    listed = [(name, reader, str(path)) for name, reader, path in bombs(tmp_path)]
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    program = f"import test_security; test_security.measure({str(tmp_path / 'listed.json')!r})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in results] == [name for name, *_ in listed]
    for name, seconds, grown, length in results:
        assert seconds < 10 and grown < 120 and length < 5000, (name, seconds, grown, length)


def test_a_deep_tuple_ends_careless_readers():
    """Why keys are text or numbers."""
    program = f"import pickle; pickle.loads(b'}})' + b'\\x85' * {DEEP} + b'K\\x01s.')"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -11
