"""Folders of pictures: which file is of which class and split, and what is told or refused of the others."""

import itertools
import os
import socket

import numpy as np
import pytest
from PIL import Image
from tiny_runs import read_recipe

from asib_jax import build
from asib_jax.data import folders, overlap, sources
from asib_jax.data.sources import load
from asib_jax.errors import UserError
from asib_jax.record import provenance
from asib_jax.record.console import setup_logging


def write_picture(path, level, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level).save(path)


def write_classes(folder, **classes):
    """Numbered pictures of one grey level each: the classes' levels."""
    for name, levels in classes.items():
        for level in levels:
            write_picture(folder / name / f"{level:03}.png", (level,) * 3)


@pytest.fixture
def divided(tmp_path):
    """train and test of two classes; of ant the levels below 100."""
    write_classes(tmp_path / "train", ant=[1, 2], cat=[101, 102])
    write_classes(tmp_path / "test", ant=[3], cat=[103, 104])
    return tmp_path


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(folders.logger, "propagate", True)
    caplog.set_level("INFO")
    return lambda: [record.getMessage() for record in caplog.records]


def levels(split):
    return split.image[:][:, 0, 0, 0].tolist()


def test_folder_of_pictures(tmp_path):
    write_picture(tmp_path / "train" / "cat" / "b.png", (1, 2, 3))
    write_picture(tmp_path / "train" / "cat" / "a.PNG", 9, mode="L")
    write_picture(tmp_path / "train" / "ant" / "z.jpg", (200, 200, 200))
    write_picture(tmp_path / "test" / "cat" / "c.png", (4, 5, 6))
    (tmp_path / "test" / "ant").mkdir()
    data = load("folder", path=str(tmp_path))
    assert data.class_names == ("ant", "cat") and data.train.image.shape == (3, 4, 6, 3)
    np.testing.assert_array_equal(data.train.image[:, 0, 0], [[200] * 3, [9] * 3, [1, 2, 3]])
    np.testing.assert_array_equal(data.train.label, [0, 1, 1])
    np.testing.assert_array_equal(data.test.image[0, 3, 5], [4, 5, 6])
    np.testing.assert_array_equal(data.test.label, [1])
    assert data.validation is None

    (tmp_path / "train" / "bee").mkdir()
    with pytest.raises(UserError, match=r"/train: no picture .* in bee$"):
        load("folder", path=str(tmp_path))
    (tmp_path / "train" / "bee").rmdir()
    write_picture(tmp_path / "test" / "dog" / "d.png", (0, 0, 0))
    with pytest.raises(UserError, match="classes that .*train has not: dog"):
        load("folder", path=str(tmp_path))
    write_picture(tmp_path / "train" / "dog" / "d.png", (0, 0, 0), size=(7, 7))
    with pytest.raises(UserError, match=r"one size: .*z\.jpg is 6x4 but .*d\.png is 7x7; dataset\.image_size=N"):
        load("folder", path=str(tmp_path))
    assert load("folder", path=str(tmp_path), image_size=5).train.image.shape == (4, 5, 5, 3)


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_a_validation_split_of_its_own(divided, name):
    write_classes(divided / name, cat=[105], ant=[5])
    data = load("folder", path=str(divided))
    assert (levels(data.train), levels(data.validation), levels(data.test)) == (
        [1, 2, 101, 102],
        [5, 105],
        [3, 103, 104],
    )
    assert data.validation.label.tolist() == [0, 1] and data.validation.index.tolist() == [4, 5]
    write_classes(divided / name, dog=[1])
    with pytest.raises(UserError, match=rf"{name} has classes that .*train has not: dog"):
        load("folder", path=str(divided))


def test_two_validation_splits_are_refused(divided):
    write_classes(divided / "val", ant=[5])
    write_classes(divided / "valid", ant=[6])
    with pytest.raises(UserError, match="holds val and valid: which is the validation split"):
        load("folder", path=str(divided))


def test_one_folder_of_classes_is_divided_once_for_all(tmp_path, told):
    write_classes(tmp_path, ant=range(20), bee=range(100, 103), cat=range(200, 227))
    data = load("folder", path=str(tmp_path))
    train, test = levels(data.train), levels(data.test)
    assert sorted(train + test) == [*range(20), *range(100, 103), *range(200, 227)]
    assert np.bincount(data.test.label).tolist() == [4, 1, 5]  # a fifth of 50, of which bee's quota is .6
    assert [level // 100 for level in train] == data.train.label.tolist()
    assert test != sorted(test)[:: len(test)] and test[:4] not in ([0, 1, 2, 3], [16, 17, 18, 19])
    again = load("folder", path=str(tmp_path))
    np.testing.assert_array_equal(again.test.image, data.test.image)
    assert told()[0].endswith("of 50 pictures 10 are set aside for test, stratified, the same ones for every seed")
    assert len(told()) == 2


def test_a_class_of_two_pictures_cannot_be_divided(tmp_path):
    write_classes(tmp_path, ant=range(20), bee=range(2), cat=range(1))
    with pytest.raises(UserError, match=r"every class needs 3 pictures; too few have bee \(2\), cat \(1\): add some"):
        load("folder", path=str(tmp_path))


@pytest.mark.parametrize("parts", [("train",), ("train", "val"), ("Train", "Test"), ("training", "testing", "more")])
def test_what_is_nearly_divided_is_no_folder_of_classes(tmp_path, parts):
    """Else the classes would be called so."""
    for part in parts:
        write_classes(tmp_path / part, ant=range(3), bee=range(3))
    with pytest.raises(UserError, match=rf"holds .*{parts[0]}.* but not both train and test: call them so"):
        load("folder", path=str(tmp_path))


def test_train_may_be_a_class(tmp_path):
    write_classes(tmp_path, train=range(4), car=range(4))
    assert load("folder", path=str(tmp_path)).class_names == ("car", "train")


def test_subfolders_belong_to_their_class_and_hidden_ones_to_none(divided, told):
    write_classes(divided / "train" / "cat", deep=[110], a=[109])
    write_classes(divided / "train" / "cat" / "deep", deeper=[111])
    for hidden in (".ipynb_checkpoints", ".cache"):
        write_classes(divided / "train", **{hidden: [7]})
        write_classes(divided / "train" / "cat", **{hidden: [8]})
    for name in ("._001.png", ".001.png", ".DS_Store"):
        (divided / "train" / "cat" / name).write_text("no picture")
    assert levels(load("folder", path=str(divided)).train) == [1, 2, 101, 102, 109, 110, 111]
    assert told() == []


def test_what_is_left_out_is_counted(divided, told):
    for name in ("notes.txt", "more.txt", "labels.CSV", "README"):
        (divided / "train" / "cat" / name).write_text("no picture")
    write_picture(divided / "train" / "stray.png", 0)
    write_classes(divided / "extra", ant=[1])
    (divided / "labels.csv").write_text("beside everything")
    load("folder", path=str(divided))
    (line,) = told()
    start, _, listed = line.partition(": left out: ")
    assert start == str(divided) and set(listed.split(", ")) == {
        "folders beside train and test: extra (1)",
        f"files beside the classes in {divided / 'train'} (1)",
        "files without a suffix (1)",
        "files called .csv (1)",
        "files called .txt (2)",
    }


def test_what_was_done_to_how_many_is_one_line(divided, told):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (6, 4)).save(divided / "train" / "cat" / "turned.jpg", exif=exif)
    for split in ("train", "test"):
        Image.new("RGBA", (6, 4), (0, 0, 0, 9)).save(divided / split / "ant" / "clear.webp")
    load("folder", path=str(divided))
    assert told() == [
        f"{divided}: of 10 pictures 2 had transparent parts, composed on white, 1 were turned by their EXIF orientation"
    ]


def special(kind, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)  # a socket's path is at most 100 bytes long
            server.bind(path.name)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": path.name}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "is no file but a pipe"),
        ("socket", "is no file but a .*socket"),
        ("device", "is no file but a .*device"),
        ("dangling", "is a link that leads to no file .*: remove it"),
        ("loop", "is a link that leads to no file .*: remove it"),
    ],
)
def test_what_is_no_file_is_refused_at_once(divided, monkeypatch, kind, message):
    monkeypatch.chdir(divided)
    special(kind, divided / "train" / "cat" / "x.png")
    with pytest.raises(UserError, match=rf"train/cat/x\.png {message}"):
        load("folder", path=str(divided))


def test_a_link_to_a_picture_is_a_picture_and_one_to_a_folder_a_folder(divided):
    write_picture(divided / "elsewhere" / "a.png", (110, 2, 3))
    write_classes(divided / "elsewhere", dog=[201])
    (divided / "train" / "cat" / "a.png").symlink_to(divided / "elsewhere" / "a.png")
    (divided / "train" / "cat" / "more").symlink_to(divided / "elsewhere" / "dog")
    (divided / "train" / "dog").symlink_to(divided / "elsewhere" / "dog")
    assert levels(load("folder", path=str(divided)).train) == [1, 2, 101, 102, 110, 201, 201]


def test_a_link_back_is_refused(divided):
    (divided / "train" / "cat" / "again").symlink_to(divided / "train" / "cat")
    with pytest.raises(UserError, match="train/cat/again is .*train/cat once more, by a link: remove the link"):
        load("folder", path=str(divided))


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff"])
def test_a_name_that_is_no_text_is_told(divided, name):
    folder = os.path.join(os.fsencode(divided / "train"), name)
    os.mkdir(folder)
    with pytest.raises(
        UserError, match=r"the folder b'.*\\x.*' in .*train is no UTF-8 text.*rename it.*PYTHONUTF8=1"
    ) as e:
        load("folder", path=str(divided))
    str(e.value).encode()


def test_files_whose_names_are_no_text_reach_the_log(divided, tmp_path_factory, logger_after_use):
    """A picture is read, what is none is told."""
    cat, results = os.fsencode(divided / "train" / "cat"), tmp_path_factory.mktemp("results")
    os.rename(os.path.join(cat, b"101.png"), os.path.join(cat, b"caf\xe9.png"))
    open(os.path.join(cat, b"a.caf\xe9"), "w").close()
    setup_logging(results)
    assert levels(load("folder", path=str(divided)).train) == [1, 2, 102, 101]
    assert "left out: files called .caf\\udce9 (1)" in (results / "log.txt").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "must hold folders train/<class>.*; it holds no folder"),
        (lambda folder: write_picture(folder / "a.png", 0), "must hold folders train/<class>.*; it holds no folder"),
        (lambda folder: (folder / "ant").mkdir(), "no picture .* in ant"),
        (lambda folder: [(folder / part).mkdir() for part in ("train", "test")], r"/train: no picture .* in <class>"),
        (
            lambda folder: [write_classes(folder / "train", ant=[1]), (folder / "test" / "ant").mkdir(parents=True)],
            r"/test: no picture .* in ant",
        ),
        (
            lambda folder: [
                write_classes(folder, ant=[1]),
                (folder / "ant" / "001.png").rename(folder / "ant" / "a.heic"),
            ],
            r"no picture .* in ant; there are files called \.heic \(1\)$",
        ),
        (
            lambda folder: [write_classes(folder, train=[1]), write_classes(folder, test=[1])],
            r"/train: no picture .* in <class>; there are files beside the classes in .*/train \(1\)",
        ),
        (lambda folder: (folder / "ant").symlink_to("nowhere"), "/ant is a link that leads to nothing: remove it"),
        (lambda folder: (folder / "ant").symlink_to("ant"), "/ant is a link that leads to nothing: remove it"),
        (lambda folder: write_classes(folder, ant=range(5)), "all training images are of one class, 'ant'"),
    ],
)
def test_layouts_that_are_none(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        load("folder", path=str(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    write_picture(tmp_path / "a.png", 0)
    with pytest.raises(UserError, match=r"dataset\.path = .*a\.png' is no folder; it must hold folders train/<class>"):
        load("folder", path=str(tmp_path / "a.png"))


def test_pictures_stay_in_the_order_of_their_names(tmp_path):
    """Kept teachers and interrupted runs know the images by it."""
    names = ["".join(letters) for letters in itertools.product("aB1-é", repeat=2)]
    for k, name in enumerate(names):
        write_classes(tmp_path / "test", ant=[0], bee=[0])
        write_picture(tmp_path / "train" / "bee" / f"{name}.png", (k,) * 3)
    write_classes(tmp_path / "train", ant=[255])
    ordered = sorted(range(len(names)), key=lambda k: f"{names[k]}.png")
    assert levels(load("folder", path=str(tmp_path)).train) == [255, *ordered]


def test_what_a_run_makes_of_a_folder(divided, told, monkeypatch):
    """Its validation split is the run's whatever the seed and the share, and its index is nobody else's."""
    monkeypatch.setattr(build.logger, "propagate", True)
    write_classes(divided / "val", cat=[105], ant=[5, 6])
    changes = {"dataset.name": "folder", "dataset.batch_size": 2, "dataset.image_size": 3}
    for seed in (0, 1):
        recipe = read_recipe("l1_ib", str(divided), **changes, seed=seed)
        data = build.load_data(recipe)
        assert levels(data.teacher_train) == [1, 2, 101, 102] == levels(data.train) and data.image_shape == (3, 3, 3)
        assert levels(data.validation) == [5, 6, 105] and levels(data.test) == [3, 103, 104]
        assert overlap.check(data)["duplicates/test_in_train"] == 0
    assert any("own, 3 images: dataset.val_fraction=0.2 has no effect" in line for line in told())
    plan_of = sources.sizes("folder", path=str(divided), image_size=3)
    rows = build.divide(recipe, plan_of.labels, plan_of.validation)
    assert [len(part) for part in rows if part is not None] == [4, 4, 3] and plan_of.image_shape == (3, 3, 3)
    other = build.load_data(read_recipe("l1_ib", str(divided), **changes | {"dataset.image_size": 4}))
    digests = [provenance.data_digests(parts) for parts in (data, other)]
    assert all(digests[0][split] != digests[1][split] for split in digests[0])
