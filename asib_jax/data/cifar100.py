"""The ways to CIFAR-100 (Krizhevsky 2009): a file of one's own, tfds, or the official archive."""

import hashlib
import http.client
import importlib.util
import logging
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np

from asib_jax.data import archives
from asib_jax.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
_PROBE_SECONDS = 3
_NETWORK_ERRORS = (OSError, http.client.HTTPException)

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """This way is not open here; the message says why."""


def read(path: Path) -> archives.Found:
    """CIFAR-100 from an .npz (x_train, y_train, x_test, y_test), the official archive, or its unpacked folder.

    Raises OSError for a file that cannot be opened, UserError where it is none of these.
    """
    if path.suffix.lower() == ".npz":
        return archives.read_npz(path, archives.NAMES, archives.OPTIONAL, mapped=True), str(path)
    return archives.read_cifar100(path), str(path)


def find(folder: Path) -> archives.Found:
    """CIFAR-100 by the first of `WAYS` that is open, with `folder` for prepared and downloaded data.

    Raises UserError, within seconds if there is no network, saying why each way is shut and what to do.
    """
    shut = []
    for name, way in WAYS.items():
        try:
            return way(folder)
        except Unavailable as why:
            shut.append(f"  {name}: {why}")
    raise UserError(
        "\n".join(
            [
                "CIFAR-100 was not found. Looked for:",
                *shut,
                f"Set dataset.path to an .npz holding {', '.join(archives.NAMES)}, to cifar-100-python.tar.gz or to "
                "its unpacked folder; or use the profile `:digits` (--config=configs/l1_ib.py:digits), whose images "
                "come with scikit-learn.",
            ]
        )
    )


def prepared_by_tfds(folder: Path) -> archives.Found:
    """What tfds prepared earlier. Reading it needs no TensorFlow if it was prepared as array_record."""
    if not (folder / "cifar100").is_dir():  # before tfds: its import is slow and its own message misleads
        raise Unavailable(f"there is no folder {folder / 'cifar100'}")
    tfds = _import_tfds()
    try:
        builder = tfds.builder("cifar100", data_dir=folder)  # tfds' own code for it, which takes none from the folder
        if not builder.is_prepared():
            raise Unavailable(f"{builder.data_path} is not complete")
        return _read_builder(builder)
    except NotImplementedError as error:
        raise Unavailable(f"{builder.data_path} is not in the format array_record") from error
    except Unavailable:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise UserError(
            f"{folder / 'cifar100'}, which tfds prepared, cannot be read: {type(error).__name__}: {error}; "
            "move it away, or set dataset.path"
        ) from error


def earlier_download(folder: Path) -> archives.Found:
    """The official archive, downloaded before."""
    archive = _archive(folder)
    if not archive.is_file():
        raise Unavailable(f"there is no file {archive}")
    return read(archive)


def downloaded_by_tfds(folder: Path) -> archives.Found:
    """Downloaded and prepared by tfds, which needs TensorFlow for it."""
    if importlib.util.find_spec("tensorflow") is None:
        raise Unavailable("it needs TensorFlow, which is not installed")
    _probe_network()  # without a network tfds tries for minutes
    tfds = _import_tfds()
    try:
        import tensorflow

        tensorflow.config.set_visible_devices([], "GPU")  # or it takes all of their memory from JAX
        builder = tfds.builder("cifar100", data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # whatever stops tfds, the archive can still be had; nothing is hidden
        log.warning("tfds could not prepare cifar100: %s", error)
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    return _read_builder(builder)


def downloaded_archive(folder: Path) -> archives.Found:
    """The official archive, downloaded and checked now. Only a file of the right digest gets the archive's name."""
    _probe_network()
    archive = _archive(folder)
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(f".{os.getpid()}")
    digest = hashlib.md5()
    log.info("downloading %s to %s", URL, archive)
    try:
        with urllib.request.urlopen(URL, timeout=30) as source, open(partial, "wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
        if digest.hexdigest() != MD5:
            raise Unavailable(f"{URL} gave a file of md5 {digest.hexdigest()}, not {MD5}")
        partial.rename(archive)
    except _NETWORK_ERRORS as error:
        raise Unavailable(f"{URL}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return read(archive)


# In order: what is here already goes before what must be fetched.
WAYS: dict[str, Callable[[Path], archives.Found]] = {
    "prepared by tfds": prepared_by_tfds,
    "the official archive": earlier_download,
    "download by tfds": downloaded_by_tfds,
    "download of the official archive": downloaded_archive,
}


def _archive(folder: Path) -> Path:
    return folder / "downloads" / "cifar-100-python.tar.gz"


def _probe_network() -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(URL, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except _NETWORK_ERRORS as error:
        raise Unavailable(f"{URL} cannot be reached ({error})") from error


def _import_tfds():
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise Unavailable(f"tensorflow_datasets cannot be imported ({error})") from error
    return tensorflow_datasets


def _read_builder(builder) -> archives.Found:
    arrays = {"class_names": np.asarray(builder.info.features["label"].names)}
    for split in ("train", "test"):
        # tfds shuffles when it prepares; the ids give back the archive's order, so that every way gives the same data.
        examples = sorted(builder.as_data_source(split), key=lambda example: example["id"])
        arrays[f"x_{split}"] = np.stack([example["image"] for example in examples])
        arrays[f"y_{split}"] = np.asarray([example["label"] for example in examples])
    return arrays, f"tfds, {builder.data_path}"
