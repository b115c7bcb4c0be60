"""What lies at dataset.path is recognised by file names, and by the labels of an .npz."""

import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from asib_jax import recipe
from asib_jax.data import recognise, sources
from asib_jax.errors import UserError
from configs import base, l1_ib


def arrays(path, count=(500, 100), classes=100, **changes):
    """An .npz with so many labels of each class in training and test, in disorder; its images are none."""
    rng = np.random.default_rng(0)
    y_train, y_test = (rng.permutation(np.repeat(np.arange(classes), n)) for n in count)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    np.savez(path, **{"x_train": images, "y_train": y_train, "x_test": images, "y_test": y_test, **changes})
    return path


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def touched(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def archive(path):
    with tarfile.open(path, "w:gz"):
        return path


FOUND = {
    "": ("cifar100", lambda tmp: ""),
    "cifar100.npz": ("cifar100", lambda tmp: arrays(tmp / "c.npz")),
    "its labels as bytes": ("cifar100", lambda tmp: arrays(tmp / "u.npz", y_test=np.repeat(np.uint8(range(100)), 100))),
    "another spelling": ("cifar100", lambda tmp: arrays(tmp / "c.npz").rename(tmp / "C.NPZ")),
    "cifar-10 as arrays": ("npz", lambda tmp: arrays(tmp / "ten.npz", (5000, 1000), 10)),
    "another test split": ("npz", lambda tmp: arrays(tmp / "a.npz", (500, 50))),
    "its coarse labels": ("npz", lambda tmp: arrays(tmp / "coarse.npz", (2500, 500), 20)),
    "labels that are text": ("npz", lambda tmp: arrays(tmp / "t.npz", y_train=np.array(["a"] * 50_000))),
    "pickled labels": ("npz", lambda tmp: arrays(tmp / "p.npz", y_train=np.array([{}], object))),
    "no .npz inside": ("npz", lambda tmp: touched(tmp / "n", "x.npz") / "x.npz"),
    "an archive": ("cifar100", lambda tmp: archive(tmp / "cifar-100-python.tar.gz")),
    "its Python folder": ("cifar100", lambda tmp: touched(tmp / "py", "train", "test", "meta", "file.txt~")),
    "its binary folder": (
        "cifar100",
        lambda tmp: touched(tmp / "bin", "train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt"),
    ),
    "imagenet32": ("imagenet32", lambda tmp: touched(tmp / "i", "train_data_batch_1.npz", "val_data.npz")),
    "half of imagenet32": ("imagenet32", lambda tmp: touched(tmp / "h", "val_data.npz")),
    "divided pictures": ("folder", lambda tmp: picture(tmp / "d" / "train" / "cat" / "1.png").parents[2]),
    "pictures": ("folder", lambda tmp: picture(tmp / "one" / "cat" / "1.png").parents[1]),
    "classes called as files of CIFAR-100": (
        "folder",
        lambda tmp: [picture(tmp / "m" / name / "1.png").parents[1] for name in ("train", "test", "meta")].pop(),
    ),
    "an empty folder": ("folder", lambda tmp: touched(tmp / "e")),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_lies_there(what, tmp_path):
    name, make = FOUND[what]
    path = str(make(tmp_path))
    assert recognise.source(path) == name in sources.SOURCES


WRONG = {
    "a picture": (lambda tmp: picture(tmp / "x.png"), "nothing that is recognised: give a folder of pictures"),
    "text": (lambda tmp: touched(tmp / "t", "labels.csv") / "labels.csv", "nothing that is recognised"),
    "nowhere": (lambda tmp: tmp / "nowhere", "does not exist"),
    "a link to nowhere": (lambda tmp: os.symlink(tmp / "x", tmp / "link") or tmp / "link", "does not exist"),
    "a pipe called .npz": (lambda tmp: os.mkfifo(tmp / "p.npz") or tmp / "p.npz", "is a pipe"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_recognised(what, tmp_path):
    make, message = WRONG[what]
    path = str(make(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        recognise.source(path)
    assert "dataset.path" in str(caught.value) and path in str(caught.value)


def test_a_home_is_looked_into(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arrays(tmp_path / "mine.npz", (2, 1), 3)
    assert recognise.source("~/mine.npz") == "npz"


def test_a_recipe_has_the_name_and_a_given_one_decides(tmp_path):
    path = str(arrays(tmp_path / "cifar.npz"))
    config = l1_ib.get_config("own")
    config.dataset.path = path
    assert recipe.read(config).dataset.name == "cifar100"
    config.dataset.name = "npz"
    assert recipe.read(config).dataset.name == "npz"
    config.dataset.update({"name": "", "path": str(picture(tmp_path / "p" / "a" / "1.png").parents[1])})
    assert recipe.read(config).dataset.name == recipe.read_stored(config).dataset.name == "folder"
    assert recipe.read(base.get_config()).dataset.name == "cifar100"
    assert recipe.read(base.get_config("digits")).dataset.name == "digits"
