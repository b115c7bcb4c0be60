"""Where weights come from, and their arrays.

What a config calls `weights` is one of
  hf:OWNER/REPO[@REVISION][/FILE]  a file of a Hugging Face repository; by default model.safetensors of its main branch
  a file                           .safetensors, .npz, or torch.save's .pth, .pt and .bin
  a folder                         a checkpoint of our own: `checkpoint.restore` reads it
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors.numpy import load_file

from asib_jax.data.archives import read_npz
from asib_jax.data.paths import expanded
from asib_jax.errors import UserError
from asib_jax.weights import checkpoint, torch_pickle

_HUB = re.compile(r"hf:(?P<repo_id>[^/@]+/[^/@]+)(@(?P<revision>(refs/[^/@]+/)?[^/@]+))?(/(?P<filename>.+))?")


_POINTER = b"version https://git-lfs.github.com/"  # of a repository that was cloned without git-lfs


def cached(weights: str) -> Path | None:
    """The local path of `weights`, or None if it is to be downloaded or, without "hf:", does not exist.

    Uses no network. A revision that was downloaded once stays what it was then, whatever its branch is now.

    Raises UserError if what follows "hf:" is no reference, or no file can be called so.
    """
    reference = _reference(weights)
    path = expanded(weights, "weights") if reference is None else None
    try:
        if path is not None:
            return path if path.exists() else None
        found = try_to_load_from_cache(**reference)
    except (ValueError, OSError) as error:  # of huggingface_hub; a name too long
        raise UserError(f"weights {weights!r}: {error}") from error
    return Path(found) if isinstance(found, str) else None  # else None, or a mark that the hub had no such file


def locate(weights: str, key: str, sha256: str = "") -> Path:
    """The local path of `weights`; downloads what the cache of huggingface_hub does not hold.

    Its environment variables say where that is (HF_HOME), which hub (HF_ENDPOINT) and as whom (HF_TOKEN). The file's
    SHA-256 is compared with the hub's, which huggingface_hub leaves undone.

    key: the config key that holds `weights`, for messages. sha256: the `digest` that it must have; "": any.

    Raises UserError where there is no such file or folder, it is another one, the cached file is damaged, or it cannot
    be downloaded; then the message tells how to fetch it by hand.
    """
    path, reference = cached(weights), _reference(weights)
    if reference is not None:
        path = _from_hub(path or _download(reference, f"{key}={weights!r}", key), f"{key}={weights!r}")
    if path is None:
        raise UserError(f"{key}={weights!r} does not exist")
    if sha256 and digest(path) != sha256.lower():
        raise UserError(
            f"{key}={weights!r}: {path} has the SHA-256 {digest(path)}, not {sha256.lower()} of "
            f"{key}_sha256; get the right one, or correct the key"
        )
    return path


def _from_hub(path: Path, setting: str) -> Path:
    """`path` in the hub's cache, whose contents are what the hub says. UserError if they are not."""
    # Where there are symbolic links this one is to a file that is named by the hub's digest: of git's objects SHA-1,
    # of large files SHA-256. That may be a link itself, so it is not resolved.
    expected = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", expected) and digest(path) != expected:
        raise UserError(
            f"{setting}: {path} is damaged, its SHA-256 is not the hub's {expected}. "
            f"Delete {path.resolve()} and start again"
        )
    return path


def load(path: str | Path) -> dict[str, np.ndarray]:
    """Named arrays of a .safetensors, .npz, .pth, .pt or .bin file, in the types they were saved in.

    bfloat16 is that of ml_dtypes. No code in a file is run; `torch_pickle.read` says what it takes of PyTorch's files.

    Raises OSError if the file cannot be opened, UserError naming it if it is of another kind or damaged.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise UserError(f"cannot read weights from {path}: expected a file named {', '.join(_READERS)}")
    with open(path, "rb") as file:  # what cannot be opened is not damaged
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is not the weights but git-lfs's pointer to them: fetch them by `git lfs pull`")
    try:
        return _READERS[path.suffix](path)
    except Exception as error:  # each format has its own kinds for a damaged file
        raise UserError(f"cannot read weights from {path}: {error}") from error


def digest(path: str | Path) -> str:
    """SHA-256 in hexadecimal: of a file's bytes; of a checkpoint's arrays, as stored in its folder."""
    if Path(path).is_dir():
        return checkpoint.digest(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reference(weights: str) -> dict[str, str] | None:
    """huggingface_hub's arguments for an "hf:" reference, None for a local path."""
    if not weights.startswith("hf:"):
        return None
    match = _HUB.fullmatch(weights)
    if not match or ".." in re.split("[:/@]", weights):  # which leads out of the cache
        raise UserError(
            f"{weights!r} is not hf:OWNER/REPO[@REVISION][/FILE]: "
            "set teacherK.weights or model.student.weights to such a reference or a path"
        )
    return {"revision": "main", "filename": "model.safetensors"} | {k: v for k, v in match.groupdict().items() if v}


def _download(reference: dict[str, str], setting: str, key: str) -> Path:
    url = hf_hub_url(**reference)
    try:
        # Asked once first: hf_hub_download asks again for 23 s where no hub is reached, longer where none answers.
        get_hf_file_metadata(url)
        return Path(hf_hub_download(**reference))  # type: ignore[call-overload]  # its names are the right ones
    except Exception as error:  # mostly of the HTTP library's own kinds, and huggingface_hub has changed libraries
        repo, revision, file = (reference[name] for name in ("repo_id", "revision", "filename"))
        raise UserError(
            f"{setting}: {file} is not in the cache {constants.HF_HUB_CACHE} and could not be downloaded: {error}\n"
            f"Where there is a network, run with the same cache (HF_HOME)\n"
            f"  hf download {repo} {file} --revision {revision}\n"
            f"or download {url} elsewhere and set {key} to its path"
        ) from error


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": load_file,
    ".npz": read_npz,
    ".pth": torch_pickle.read,
    ".pt": torch_pickle.read,
    ".bin": torch_pickle.read,
}
