"""Weights from a hub, which a local server stands for, and from files: right, checked, and clear when missing."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save, save_file
from test_pretrained import SMALL, state_for, zeros_of
from test_recipe import recipe_of

from asib_jax.errors import UserError
from asib_jax.recipe import checks
from asib_jax.weights import checkpoint
from asib_jax.weights.origins import cached, digest, load, locate
from asib_jax.weights.reading import read_weights

ARRAYS = {"conv1.weight": np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1), "fc.bias": np.float32([1, -2])}
CONTENT = save(ARRAYS)
KEY = "teacher1.weights"


class Hub(http.server.ThreadingHTTPServer):
    """What the hub answers to /OWNER/REPO/resolve/REVISION/FILE, over `files`: "OWNER/REPO/REVISION/FILE" -> content.

    log: methods of the requests so far, with the Range asked for. cut: how many of the next downloads end half-way.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.log, self.cut, self.etags = {"me/net/main/model.safetensors": CONTENT}, [], 0, {}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class HubRequest(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, wanted = self.server, self.headers.get("Range")
        hub.log.append(f"{self.command} {wanted}" if wanted else self.command)
        name = self.path.lstrip("/").replace("/resolve/", "/")
        content = hub.files.get(name)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", hashlib.sha1(name.split("/")[2].encode()).hexdigest())
        self.send_header("X-Linked-Etag", f'"{hub.etags.get(name, hashlib.sha256(content).hexdigest())}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("ETag", '"of-the-storage-behind-the-hub"')
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body and hub.cut:
            hub.cut -= 1
            self.wfile.write(content[start : len(content) // 2])
        elif body:
            self.wfile.write(content[start:])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub and an empty cache, as HF_ENDPOINT and HF_HUB_CACHE would give; these are read once, at import."""
    hub = Hub()
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def check_arrays(arrays, expected=ARRAYS):
    assert set(arrays) == set(expected)
    for name, value in expected.items():
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(arrays[name], value)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_download_once(hub):
    assert cached("hf:me/net") is None and not hub.log
    path = locate("hf:me/net", KEY)
    assert hub.log.count("GET") == 1
    check_arrays(load(path))
    hub.log.clear()
    assert locate("hf:me/net", KEY) == cached("hf:me/net") == cached("hf:me/net@main/model.safetensors") == path
    assert not hub.log
    assert digest(path) == hashlib.sha256(CONTENT).hexdigest()


def test_revision_and_file(hub):
    other = save({"w": np.float32([3])})
    hub.files |= {
        "me/net/v1.0/model.safetensors": other,
        "me/net/main/sub/a.safetensors": other,
        "me/net/refs%2Fpr%2F1/model.safetensors": other,
    }
    locate("hf:me/net", KEY)
    for reference in (
        "hf:me/net@v1.0",
        "hf:me/net/sub/a.safetensors",
        "hf:me/net@main/sub/a.safetensors",
        "hf:me/net@refs/pr/1",
    ):
        check_arrays(load(locate(reference, KEY)), {"w": np.float32([3])})
        assert cached(reference) is not None
    assert cached("hf:me/net@v2") is None and cached("hf:me/net/b.safetensors") is None
    for wrong in ("hf:net", "hf:me/net@", "hf:me/net/", "hf:/net", "hf:me/net@a@b", "hf:"):
        with pytest.raises(ValueError, match=re.escape("is not hf:OWNER/REPO[@REVISION][/FILE]")):
            locate(wrong, KEY)
    with pytest.raises(ValueError, match="a..b/c"):
        locate("hf:a..b/c", KEY)


def test_interrupted_download_is_resumed(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1)  # only whole chunks are kept, and those are of 10 MB
    hub.cut = 1
    try:
        path = locate("hf:me/net", KEY)
    except OSError:  # huggingface_hub 1.0 resumes at the next call only
        path = locate("hf:me/net", KEY)
    check_arrays(load(path))
    assert hub.log.count("GET") == 1 and f"GET bytes={len(CONTENT) // 2}-" in hub.log and hub.cut == 0


def test_wrong_content_is_refused_until_deleted(hub):
    """As the hub sent it, and as it became in the cache."""
    name = "me/net/main/model.safetensors"
    hub.etags[name], hub.files[name] = hashlib.sha256(CONTENT).hexdigest(), CONTENT[:-1] + b"\x01"

    def refused():
        with pytest.raises(ValueError, match=f"{KEY}='hf:me/net': .* is damaged, its SHA-256 is not") as error:
            locate("hf:me/net", KEY)
        return Path(re.search("Delete (.*) and start again", str(error.value))[1])

    blob = refused()
    assert blob == refused()
    hub.files[name] = CONTENT
    blob.unlink()
    assert cached("hf:me/net") is None
    check_arrays(load(locate("hf:me/net", KEY)))
    blob.write_bytes(CONTENT.replace(b"fc.bias", b"fc.bxas"))
    assert blob == refused()


def test_only_a_digest_of_the_content_is_compared(hub):
    """Not git's SHA-1 of a small file, a name in the store behind the hub's, or the file's own without links."""
    hub.etags["me/net/main/model.safetensors"] = "0" * 40
    path = locate("hf:me/net", KEY)
    blob = path.resolve()
    assert blob.name == "0" * 40
    link, store = blob.with_name(hashlib.sha256(CONTENT).hexdigest()), blob.with_name("e" * 64)
    blob.rename(store)
    link.symlink_to(store)
    path.unlink()
    path.symlink_to(link)
    assert path.resolve() == store and locate("hf:me/net", KEY) == path
    path.unlink()
    store.rename(path)
    assert locate("hf:me/net", KEY) == path


def test_not_cached_and_no_network(hub, monkeypatch):
    """At once, and with all that is needed to go on: with nothing listening, and with HF_HUB_OFFLINE."""
    held = locate("hf:me/net", KEY)
    url = f"{hub.endpoint}/me/net/resolve/v1/b.safetensors"
    hub.close()

    def refusal(reason):
        start = time.monotonic()
        with pytest.raises(UserError, match=reason) as error:
            locate("hf:me/net@v1/b.safetensors", KEY)
        assert time.monotonic() - start < 10  # huggingface_hub alone: 23 s
        return str(error.value)

    message = refusal("refused")
    for part in (
        f"{KEY}='hf:me/net@v1/b.safetensors': b.safetensors is not in the cache {constants.HF_HUB_CACHE} ",
        "\n  hf download me/net b.safetensors --revision v1\n",
        f"\nor download {url} elsewhere and set {KEY} to its path",
    ):
        assert part in message
    assert locate("hf:me/net", KEY) == held
    check_arrays(load(held))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal("offline mode is enabled")
    assert locate("hf:me/net", KEY) == held


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(UserError, match="(?s)absent.bin is not in the cache .*404"):
        locate("hf:me/net/absent.bin", KEY)
    assert cached("hf:me/net/absent.bin") is None


def test_environment_variables_choose_hub_and_cache(hub, tmp_path):
    program = f"from asib_jax.weights import origins\nprint(origins.locate('hf:me/net', {KEY!r}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=True,
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    assert output.startswith(str(tmp_path / "home"))
    check_arrays(load(output.strip()))


# --- files and folders -----------------------------------------------------------------------------------------------


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "a.npz").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/a.npz", KEY) == tmp_path / "a.npz"
    for path in (tmp_path, tmp_path / "a.npz"):
        assert locate(str(path), KEY) == cached(str(path)) == path
    missing = str(tmp_path / "b.npz")
    assert cached(missing) is None
    with pytest.raises(ValueError, match=re.escape(f"{KEY}={missing!r} does not exist")):
        locate(missing, KEY)


def test_formats(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **ARRAYS)
    for name in ("a.safetensors", "a.npz"):
        check_arrays(load(tmp_path / name))
        check_arrays(load(str(tmp_path / name)))
    assert digest(tmp_path / "a.npz") == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()


def test_bfloat16_of_safetensors(tmp_path):
    """The file is built from the format's description."""
    values = np.array([[0.5, -3], [1e30, 7]], ml_dtypes.bfloat16)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    check_arrays(load(tmp_path / "a.safetensors"), {"w": values})


@pytest.mark.pytorch
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pytorch_files(tmp_path, suffix):
    import torch

    torch.save({key: torch.tensor(value) for key, value in ARRAYS.items()}, tmp_path / f"a{suffix}")
    check_arrays(load(tmp_path / f"a{suffix}"))


def test_what_cannot_be_read_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    np.savez(tmp_path / "pickled.npz", fc=np.array([{"a": 1}]))
    save_file(ARRAYS, tmp_path / "a.safetensors")
    refused = {
        "pickled.npz": f"{tmp_path}/pickled.npz: array fc cannot be read (pickles are refused)",
        "a.h5": "expected a file named .safetensors, .npz, .pth, .pt, .bin",
    }
    for name in ("a.npz", "a.safetensors"):
        content = (tmp_path / name).read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            (tmp_path / f"cut{length}_{name}").write_bytes(content[:length])
            refused[f"cut{length}_{name}"] = ""
    for name in ("cut.pth", "cut.pt", "cut.bin"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        refused[name] = "not a state dict by torch.save, or not all of it"
    for name, reason in refused.items():
        with pytest.raises(ValueError, match=re.escape(f"cannot read weights from {tmp_path / name}: {reason}")):
            load(tmp_path / name)
    for name in ("absent.safetensors", "absent.npz", "absent.bin"):
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            load(tmp_path / name)


def test_folder_is_a_checkpoint(tmp_path):
    tree = {"params": {"fc": {"bias": np.float32([1, -2])}}, "batch_stats": {}}
    checkpoint.save(tmp_path / "best", tree)
    path = locate(str(tmp_path / "best"), KEY)
    check_arrays(checkpoint.restore(path)["params"]["fc"], tree["params"]["fc"])
    assert digest(path) == checkpoint.digest(tmp_path / "best") != digest(next(path.glob("_METADATA")))
    with pytest.raises(ValueError, match="is not a checkpoint"):
        digest(tmp_path)


# --- a given digest --------------------------------------------------------------------------------------------------


def test_only_weights_of_the_given_digest_are_located(hub, tmp_path):
    """From the hub, of a file, which is no weights at all, and of a folder; in either case of letters."""
    (tmp_path / "a.npz").write_bytes(b"never parsed")
    checkpoint.save(tmp_path / "best", {"params": {"bias": np.float32([1])}, "batch_stats": {}})
    for given in ("hf:me/net", str(tmp_path / "a.npz"), str(tmp_path / "best")):
        right = digest(locate(given, KEY))
        assert locate(given, KEY, right) == locate(given, KEY, right.upper()) == locate(given, KEY)
        with pytest.raises(UserError) as error:
            locate(given, KEY, "a" * 64)
        for part in (f"{KEY}={given!r}", str(cached(given)), right, "a" * 64, f"{KEY}_sha256"):
            assert part in str(error.value)


@pytest.mark.parametrize("key", ["teacher1.weights", "model.student.weights"])
@pytest.mark.parametrize("given", ["abc", "g" * 64, "a" * 63, "a" * 65, " " + "a" * 63, "a" * 64 + "\n", "\u0661" * 64])
def test_a_digest_is_64_hexadecimal_digits(key, given):
    with pytest.raises(UserError, match=f"^{re.escape(key)}_sha256='.*' must be 64 hexadecimal digits"):
        checks.check(recipe_of({f"{key}_sha256": given}))
    checks.check(recipe_of({f"{key}_sha256": "0123456789abcdef" * 3 + "0123456789ABCDEF"}))


def test_references_name_files_of_the_hub_only(hub, tmp_path):
    """`..` would lead out of the cache; what no file can be called is no bare error of the system."""
    locate("hf:me/net", KEY)
    (tmp_path / "secret.npz").touch()
    for wrong in (
        "hf:me/net/../../../../secret.npz",
        "hf:me/net@..",
        "hf:me/net@../x.npz",
        "hf:../net",
        "hf:me/..",
        "hf:a..b/c",
        "x" * 5000,
        "~nobody-of-this-name/x.npz",
    ):
        with pytest.raises(UserError):
            cached(wrong)
    assert cached("a\0b") is None


# --- the classes they tell apart --------------------------------------------------------------------------------------


def test_published_classifiers_are_no_start_where_classes_have_another_order(hub, tmp_path):
    """Of a file, here or of the hub; a checkpoint of ours has the data set's own order."""
    state = {name: value for name, value in state_for(SMALL).items() if value.ndim}
    hub.files["me/net/main/model.safetensors"] = save(state)
    save_file(state, tmp_path / "file.safetensors")
    initial = zeros_of(SMALL)
    checkpoint.save(tmp_path / "ours", read_weights("hf:me/net", KEY, SMALL, initial, sha256="").variables)
    for given, dataset, taken in (
        ("hf:me/net", "imagenet32", False),
        ("hf:me/net", "cifar100", True),
        (f"{tmp_path}/file.safetensors", "imagenet32", False),
        (f"{tmp_path}/ours", "imagenet32", True),
    ):
        variables, fresh = read_weights(given, KEY, SMALL, initial, sha256="", dataset=dataset)
        classifier, stem = variables["params"]["classifier"], variables["params"]["stem"]
        np.testing.assert_array_equal(classifier["kernel"], state["fc.weight"].T if taken else 0)
        np.testing.assert_array_equal(classifier["bias"], state["fc.bias"] if taken else 0)
        np.testing.assert_array_equal(stem["bn"]["bias"], state["bn1.bias"])
        assert set(fresh) == (set() if taken else {"params/classifier/kernel", "params/classifier/bias"})
        assert all("imagenet32" in why for why in fresh.values())
