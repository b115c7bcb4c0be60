"""What lies at `dataset.path`, told by the names of files and, of an .npz, by its labels; no image is read."""

from pathlib import Path

import numpy as np

from asib_jax.data import archives
from asib_jax.data.paths import existing
from asib_jax.errors import UserError

_ARCHIVES = (".gz", ".tgz", ".tar")
_CIFAR100 = {"y_train": 500, "y_test": 100}  # images of each class


def source(path: str) -> str:
    """The `dataset.name` of what `path` holds; "cifar100", which is downloaded, for "".

    Raises UserError for a path that does not exist or holds nothing known, OSError for one that cannot be looked into.
    """
    if not path:
        return "cifar100"
    found = existing(path, "dataset.path")
    if found.is_dir():
        return _of_folder(found)
    if found.suffix.lower() == ".npz":
        return "cifar100" if _is_cifar100(found) else "npz"
    if found.suffix.lower() in _ARCHIVES:
        return "cifar100"
    raise UserError(
        f"dataset.path={path!r} is nothing that is recognised: give a folder of pictures, one subfolder for each "
        "class, or an .npz of arrays, or cifar-100-python.tar.gz; docs/data.md has what is read, and how"
    )


def _of_folder(folder: Path) -> str:
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    if any(names.issuperset(files) for files in archives.CIFAR_FILES):
        return "cifar100"
    if "val_data.npz" in names or "train_data_batch_1.npz" in names:
        return "imagenet32"
    return "folder"


def _is_cifar100(path: Path) -> bool:
    """Whether the arrays are those of CIFAR-100 by their labels, of which each class has as many as another."""
    try:
        labels = archives.read_npz(path, tuple(_CIFAR100))
    except UserError:  # who reads it will say what is wrong
        return False
    return all(np.array_equal(np.sort(labels[name]), np.repeat(range(100), n)) for name, n in _CIFAR100.items())
