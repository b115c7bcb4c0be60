"""PyTorch's files: what torch.save wrote comes back, and nothing that a pickle asks for is run.

Files are also built by hand, from the format's description, so that most of this runs without torch.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from asib_jax.weights.torch_pickle import read

VALUES = np.arange(6, dtype=np.float32)
FLOAT, REBUILD = b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"
HEAD = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})  # of a stream


class Raw:
    """Opcodes (bytes) put into a pickle as they are, and values pickled between them."""

    def __init__(self, *parts):
        self.parts = parts


class Pickler(pickle._Pickler):
    """The pickler written in Python, with `Raw`."""

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Raw):
            for part in value.parts:
                self.write(part) if isinstance(part, bytes) else self.save(part)
        else:
            super().save(value, save_persistent_id)


def pickled(value, protocol=2):
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


class Evil:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def storage(key="0", numel=6, dtype=FLOAT, kind="storage", rest=()):
    return Raw((kind, Raw(dtype), key, "cpu", numel, *rest), b"Q")


def tensor(storage=storage(), offset=0, size=(2, 3), stride=(3, 1), rest=(False, OrderedDict())):
    """A tensor, as PyTorch pickles one."""
    return Raw(REBUILD, (storage, offset, size, stride, *rest), b"R")


def write_zip(path, value, storages=None, order=b"little", protocol=2):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("any/data.pkl", pickled(value, protocol))
        if order:
            archive.writestr("any/byteorder", order)
        for key, content in (storages or {"0": VALUES.tobytes()}).items():
            archive.writestr(f"any/data/{key}", content)


def write_stream(path, value, storages=None, head=HEAD, protocol=2):
    storages = storages or {"0": VALUES.tobytes()}
    content = b"".join(pickled(part, protocol) for part in (*head, value, list(storages)))
    for raw in storages.values():
        content += (len(raw) // 4).to_bytes(8, "little") + raw
    path.write_bytes(content)


WRITERS = (write_zip, write_stream)


def refusal(path):
    with pytest.raises(ValueError) as error:
        read(path)
    return str(error.value)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_files_by_hand(tmp_path):
    path = tmp_path / "w.pth"
    for order, raw in ((b"little", VALUES), (None, VALUES), (b"big", VALUES.byteswap())):
        write_zip(
            path, OrderedDict(w=tensor(), s=tensor(offset=1, size=(2, 2), stride=(1, 2))), {"0": raw.tobytes()}, order
        )
        arrays = read(path)
        np.testing.assert_array_equal(arrays["w"], VALUES.reshape(2, 3))
        np.testing.assert_array_equal(arrays["s"], [[1, 3], [2, 4]])
        assert arrays["w"].dtype == np.float32 and not arrays["w"].flags.writeable
    old = storage(rest=(None,))
    write_stream(path, {"w": tensor(old), "none": tensor(old, 0, (0, 3)), "last": tensor(old, 5, (), ())})
    arrays = read(path)
    np.testing.assert_array_equal(arrays["w"], VALUES.reshape(2, 3))
    assert arrays["none"].shape == (0, 3) and arrays["last"] == 5 and arrays["last"].shape == ()


def test_wrappers_and_prefixes(tmp_path):
    def names(value):
        write_zip(tmp_path / "w.pth", value)
        return set(read(tmp_path / "w.pth"))

    inner = {"module.a": tensor(), "module.module.b": tensor()}
    assert names(inner) == {"a", "module.b"}
    assert names({"module.a": tensor(), "b": tensor()}) == {"module.a", "b"}
    for prefix in ("_orig_mod.", "_orig_mod.module.", "module._orig_mod."):
        assert names({f"{prefix}a": tensor(), f"{prefix}module.b": tensor()}) == {"a", "module.b"}
    assert names({"state_dict": inner, "epoch": 3}) == names({"model": inner}) == {"a", "module.b"}
    assert names({"model": tensor()}) == {"model"}  # a parameter of that name
    write_zip(tmp_path / "w.pth", {"state_dict": inner, "model": inner})
    assert "'state_dict' is a Dictionary, not a tensor" in refusal(tmp_path / "w.pth")
    write_zip(tmp_path / "w.pth", {"net": inner})
    assert "'net' is a Dictionary, not a tensor" in refusal(tmp_path / "w.pth")
    write_zip(tmp_path / "w.pth", [tensor()])
    assert "it holds a list, not a state dict" in refusal(tmp_path / "w.pth")


@pytest.mark.pytorch
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves(tmp_path, zipped):
    import torch

    def round_trip(value):
        torch.save(value, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        return read(tmp_path / "w.pth")

    names = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    arrays = round_trip({name: torch.tensor([[0, 1, 100]]).to(getattr(torch, name)) for name in names})
    for name in names:
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        assert arrays[name].dtype == dtype
        np.testing.assert_array_equal(arrays[name], np.array([[0, 1, 100]]).astype(dtype))

    base = torch.arange(24.0).reshape(2, 3, 4)
    views = {
        "whole": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[1:, ::2, 1:3],
        "scalar": base[1, 2, 3],
        "expanded": base[:, :1].expand(2, 5, 4),
        "empty": base[:, 3:],
        "alone": torch.empty(0),
        "param": torch.nn.Parameter(base[0]),
    }
    for name, array in round_trip(views).items():
        np.testing.assert_array_equal(array, views.pop(name).detach().numpy())
    assert not views

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = network.state_dict()  # an OrderedDict with an attribute
    assert hasattr(state, "_metadata")
    for arrays in (round_trip(state), round_trip({"epoch": 1, "model": torch.nn.DataParallel(network).state_dict()})):
        assert list(arrays) == list(state)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, state[name].numpy())
    with pytest.raises(ValueError, match="7 were given"):  # PyTorch negates when it reads: not the stored values
        round_trip({"negated": torch.ones(2, dtype=torch.complex64).conj().imag})


# --- what is not run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_is_run(tmp_path, write, protocol):
    made = tmp_path / "made"
    attacks = {
        f"{os.name}.system": Evil(os.system, f"touch {made}"),
        "builtins.eval": Evil(eval, f"open({str(made)!r}, 'w')"),
        "builtins.getattr": Evil(getattr, OrderedDict, "fromkeys"),
        "shutil.move": Raw(f"cshutil\nmove\n(V{tmp_path}/w.pth\nV{made}\ntR".encode()),
        "torch.jit._unwrap_optional": Raw(b"ctorch.jit\n_unwrap_optional\n"),
        "__torch__.Net": Raw(b"c__torch__\nNet\n)R"),  # a TorchScript archive's
        "torch.load": Raw(f"ctorch\nload\n(V{made}\ntR".encode()),
        "numpy.load": Raw(f"cnumpy\nload\n(V{made}\ntR".encode()),
        "collections.OrderedDict.fromkeys": Raw(b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93"),
        "collections.namedtuple": Raw(b"ccollections\nnamedtuple\n"),
        "torch._utils._import_dotted_name": Raw(b"ctorch._utils\n_import_dotted_name\nVos.system\n\x85R"),
    }
    for name, attack in attacks.items():
        for value in (attack, {"w": attack}, {"state_dict": OrderedDict(a=[{"b": (attack,)}])}):
            write(tmp_path / "w.pth", value, protocol=protocol)
            message = refusal(tmp_path / "w.pth").replace("__builtin__", "builtins")
            assert f"it names {name}, which is not needed here" in message
            assert not made.exists() and (tmp_path / "w.pth").exists()
    pickle.loads(pickled(attacks["builtins.eval"]))
    assert made.exists()  # the attack would have worked


def test_every_pickle_in_a_stream_is_guarded(tmp_path):
    made = tmp_path / "made"
    evil = Evil(os.mkdir, str(made))
    for i in range(3):
        write_stream(tmp_path / "w.pth", {"w": tensor()}, head=(*HEAD[:i], evil, *HEAD[i + 1 :]))
        assert "posix.mkdir" in refusal(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"".join(map(pickled, (*HEAD, {"w": tensor()}, [evil]))))
    assert "posix.mkdir" in refusal(tmp_path / "w.pth")
    write_zip(tmp_path / "w.pth", {"w": tensor(storage(kind=evil))})
    assert "posix.mkdir" in refusal(tmp_path / "w.pth")
    assert not made.exists()


def test_a_file_cannot_change_how_the_next_is_read(tmp_path):
    """BUILD sets attributes of whatever a pickle can name."""
    for target in (REBUILD, b"ctorch._utils\n_rebuild_parameter\n", FLOAT, b"ccollections\nOrderedDict\n", tensor()):
        for state in ((None, {"__defaults__": (1, 2)}), {"key": 1}, (1, ())):
            write_zip(tmp_path / "w.pth", {"w": Raw(target, state, b"b")})
            refusal(tmp_path / "w.pth")
    write_zip(tmp_path / "w.pth", {"w": tensor()})
    np.testing.assert_array_equal(read(tmp_path / "w.pth")["w"], VALUES.reshape(2, 3))
    write_zip(tmp_path / "w.pth", {"w": tensor(rest=())})
    assert "missing 2 required" in refusal(tmp_path / "w.pth")


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_views_stay_inside_their_storage(tmp_path):
    """Byte steps of 2**62 wrap around in 64 bits, to inside: numpy's own check of bounds lets them through."""
    for view in (
        {"offset": 1},
        {"size": (3, 3)},
        {"stride": (4, 1)},
        {"size": (7,), "stride": (1,)},
        {"size": (), "stride": (), "offset": 6},
        {"size": (5,), "stride": (2**60,)},
    ):
        write_zip(tmp_path / "w.pth", {"w": tensor(**view)})
        assert "reaches outside its storage of 6" in refusal(tmp_path / "w.pth"), view
    for view in ({"offset": -1}, {"size": (-1, 3)}, {"offset": 5, "stride": (-3, 1)}, {"offset": 2**64}):
        write_zip(tmp_path / "w.pth", {"w": tensor(**view)})
        assert "are not whole numbers from 0 on" in refusal(tmp_path / "w.pth"), view
    for view in (
        {"size": (2.0, 3)},
        {"offset": "0"},
        {"size": None},
        {"size": (2,)},
        {"size": (2**70,), "stride": (0,)},
    ):
        write_zip(tmp_path / "w.pth", {"w": tensor(**view)})
        refusal(tmp_path / "w.pth")


def test_storages_are_what_was_announced(tmp_path):
    path = tmp_path / "w.pth"
    for wrong in (
        storage(numel=7),
        storage(numel=5),
        storage(numel=-6),
        storage(numel="6"),
        storage("1"),
        storage(kind="module"),
        storage(rest=(("0", 0, 6),)),
        storage(dtype=b"VComplexStorage\n"),
        storage(dtype=b"ctorch\nQInt8Storage\n"),
        storage(key="../data.pkl"),
        storage(dtype=b"]"),
    ):
        write_zip(path, {"w": tensor(wrong)})
        refusal(path)
        write_stream(path, {"w": tensor(wrong)})
        refusal(path)
    write_stream(path, {"w": tensor()})
    path.write_bytes(path.read_bytes().replace((6).to_bytes(8, "little"), (7).to_bytes(8, "little")))
    assert "storage 0 is not of 6 elements" in refusal(path)
    write_zip(path, {"w": tensor(), "as_int": tensor(storage(dtype=b"ctorch\nIntStorage\n"))})
    assert "reference 0 is not one to a storage of 6 elements IntStorage" in refusal(path)
    write_zip(path, {"w": Raw(b"\x88Q")})  # a reference that is no tuple
    refusal(path)


@pytest.mark.parametrize("write", WRITERS)
def test_damaged_files_are_refused_whole(tmp_path, write):
    """Cut anywhere; and with one flipped bit of the values, which a zip archive's checksum shows."""
    path = tmp_path / "w.pth"
    write(path, {"w": tensor()})
    content = path.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        assert "not a state dict by torch.save, or not all of it" in refusal(path)
    if write is write_zip:
        at = content.index(VALUES.tobytes()) + 9
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "Bad CRC-32" in refusal(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "w.bin"
    for content in (b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n", pickled({"w": 1})):
        path.write_bytes(content)
        assert "not a state dict by torch.save" in refusal(path)
    np.savez(tmp_path / "w.npz", w=VALUES)
    assert "it holds 0 files NAME/data.pkl" in refusal(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        read(tmp_path / "absent.pth")


@pytest.mark.pytorch
def test_the_conversion_a_refusal_suggests_works(tmp_path):
    import torch
    from safetensors import numpy

    source = tmp_path / "weights.pth"
    torch.save({"fc.bias": torch.tensor([1 + 2j])}, source)
    message = refusal(source)
    assert "it names torch.ComplexFloatStorage" in message
    exec(message[message.index("import torch") :], {})
    np.testing.assert_array_equal(numpy.load_file(tmp_path / "weights.safetensors")["fc.bias"], [1 + 2j])
