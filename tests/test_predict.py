"""A student's predictions of pictures: against the student applied plainly, and what pictures become before it."""

import collections
import csv
import json
import os
import re

import numpy as np
import pytest
from launching import launch
from networks import make_split
from PIL import Image
from tiny_runs import read_config, tiny_networks

from asib_jax import build, recipe as recipes
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, Variables, init_network
from asib_jax.record import finished
from asib_jax.record.experiment import Record
from asib_jax.tools import predict

pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = ["red fox", "été", "c", "d", "e, f"]


@pytest.fixture(scope="module", autouse=True)
def networks():
    with tiny_networks():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose data are nowhere: its students are random; and a function to apply one to images."""
    folder, config = (
        tmp_path_factory.mktemp("results"),
        read_config("l1_ib", "gone.npz", **{"model.student.std": (0.1,)}),
    )
    recipe = recipes.read(config)
    model = build.build_networks(recipe, len(NAMES)).student.clone(adapter_dim=0)
    students = {name: init_network(model, seed, name, (8, 8, 3)) for seed, name in enumerate(("best", "last"))}
    own = Variables({"student": students["last"]["params"]}, {"student": students["last"]["batch_stats"]})
    record = Record.create(folder, "test", "run", config.to_dict())
    record.about |= {"class_names": NAMES, "image_shape": [8, 8, 3]}
    finished.save(record, recipe, Networks(model), finished.Finished(own, students, collections.Counter()))

    def apply(name, images):
        logits = np.asarray(model.apply(students[name], images, train=False).logit, np.float64)
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    return record.folder, apply


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures in two subfolders, beside what is none, and their images in the order of their paths."""
    folder, images = tmp_path_factory.mktemp("pictures"), make_split(70).image
    for row, image in enumerate(images):
        path = folder / f"part{row // 40}" / f"{row:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "notes.txt").touch()
    return folder, images


@pytest.mark.parametrize("student", ["best", "last"])
def test_predictions_are_those_of_the_student_applied_plainly(run, pictures, student):
    (folder, apply), (source, images) = run, pictures
    found = predict.predict(folder, student, [str(source / "part1"), str(source / "part0" / "003.png"), str(source)])
    rows = [*range(40, 70), 3, *range(70)]
    assert [int(file.stem) for file in found.files] == rows and found.names == tuple(NAMES)
    np.testing.assert_allclose(found.probabilities, apply(student, images[rows]), rtol=1e-5)


def test_the_table_and_the_csv_have_the_most_probable_classes(run, pictures, tmp_path):
    (folder, apply), (source, images) = run, pictures
    expected = apply("best", images[:2])
    out, two = tmp_path / "out.csv", [str(source / "part0" / f"00{row}.png") for row in (0, 1)]
    told = launch("predict", f"--run={folder}", "--top=9", f"--csv={out}", *two)
    assert told.returncode == 0, told.stderr
    assert told.stdout == f"2 predictions in {out}\n"
    with open(out, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["file", "class", "probability", "class 2", "probability 2"] and len(header) == 11
    for row, file, wanted in zip(rows, two, expected, strict=True):
        order = np.argsort(-wanted)
        assert row[0] == file and row[1::2] == [NAMES[k] for k in order]
        np.testing.assert_allclose([float(cell) for cell in row[2::2]], wanted[order], rtol=1e-5)
    again = launch("predict", f"--run={folder}", f"--csv={out}", *two)
    assert again.returncode == 2 and f"--csv={out} exists" in again.stderr
    shown = launch("predict", f"--run={folder}", "--student=last", *two, str(source / "notes.txt"))
    assert shown.returncode == 2 and "notes.txt cannot be read as a picture" in shown.stderr
    shown = launch("predict", str(folder), *two)
    lines = [re.split("  +", line) for line in shown.stdout.splitlines()]
    best = [[file, NAMES[wanted.argmax()], f"{100 * wanted.max():.2f}"] for file, wanted in zip(two, expected)]
    assert lines == [["file", "class", "%"], *best]


def test_pictures_of_another_kind_are_brought_to_the_runs_and_that_is_told(run, pictures, tmp_path):
    (folder, apply), (_, images) = run, pictures
    grey, large = tmp_path / "grey.png", tmp_path / "large.png"
    Image.fromarray(images[0, ..., 0]).save(grey)
    Image.fromarray(images[1].repeat(4, axis=0).repeat(4, axis=1)).save(large)
    (tmp_path / "readme.md").touch()
    told = launch("predict", f"--run={folder}", str(tmp_path))
    assert told.returncode == 0 and "left out: 1 files called .md" in told.stderr
    assert "of 2 pictures 1 were resized to 8 x 8" in told.stderr
    wanted = apply("best", images[:1, ..., :1].repeat(3, axis=-1))[0]
    assert told.stdout.splitlines()[1].split() == [str(grey), NAMES[wanted.argmax()], f"{100 * wanted.max():.2f}"]


def test_colours_become_grey_where_the_run_has_one_channel(tmp_path):
    images, rng = make_split(3).image, np.random.default_rng(0)
    images[2] = rng.integers(0, 256, (8, 8, 1))
    files = [tmp_path / f"{row}.png" for row in range(3)]
    for file, image in zip(files, images):
        Image.fromarray(image).save(file)
    found, done = predict.read_images(files, (8, 8, 1))
    assert found.dtype == np.uint8 and done == {"had colours, of which the brightness was taken": 2}
    np.testing.assert_array_equal(found[2], images[2, ..., :1])
    np.testing.assert_allclose(found[:2, ..., 0], images[:2] @ [0.299, 0.587, 0.114], atol=0.51)  # ITU-R BT.601


@pytest.mark.parametrize(
    "shape, message", [((8, 9, 3), r"0\.png is 8x8; the run's images are 9x8"), ((8, 8, 2), "have 2 channels")]
)
def test_pictures_that_cannot_become_the_runs_are_refused(tmp_path, shape, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=message):
        predict.read_images([tmp_path / "0.png"], shape)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--run=RUN"], "no picture .* say which files or folders"),
        (["--run=RUN", "gone.png"], "gone.png does not exist"),
        (["--run=RUN", "EMPTY"], "no picture .*empty"),
        (["--run=RUN", "EMPTY/pipe"], "pipe is no file but a pipe"),
        (["--run=RUN", "PICTURES", "--student=control_best"], "--student=control_best: the run in .* has best, last"),
        (["--run=EMPTY", "PICTURES"], "is no run folder"),
        (["--run=RUN", "PICTURES", "--top=0"], "top=0"),
        ([], "--run"),
        (["PICTURES"], "is no run folder"),  # the first that is no flag
    ],
)
def test_what_a_user_can_mend_is_told(run, pictures, tmp_path, arguments, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    if "pipe" in message:
        os.mkfifo(empty / "pipe")
    places = {"RUN": str(run[0]), "PICTURES": str(pictures[0]), "EMPTY": str(empty)}
    told = launch("predict", *(re.sub("RUN|PICTURES|EMPTY", lambda found: places[found[0]], one) for one in arguments))
    assert told.returncode == 2 and re.search(message, told.stderr), told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": None},
        {"class_names": NAMES[:4]},
        {"image_shape": None},
        {"image_shape": [8, 8]},
        {"image_shape": [8, "8", 3]},
        {"image_shape": [0, 8, 3]},
    ],
)
def test_a_record_that_does_not_say_what_the_classes_and_images_are_is_told(run, pictures, change):
    about = run[0] / "about.json"
    whole = about.read_text()
    about.write_text(json.dumps({key: value for key, value in (json.loads(whole) | change).items() if value}))
    try:
        with pytest.raises(UserError, match="about.json does not say class_names and image_shape"):
            predict.predict(run[0], "best", [str(pictures[0])])
    finally:
        about.write_text(whole)


def test_a_logit_that_is_not_finite_names_no_class():
    found = predict.Predictions([], ("a", "b"), np.array([[np.nan, np.nan]]))
    assert [*found._replace(files=["x"]).rows(1)] == [["x", "", pytest.approx(np.nan, nan_ok=True)]]
