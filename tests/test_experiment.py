"""The record of a run in real files: names, metrics, the summary table and `latest`."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.errors import UserError
from asib_jax.record.experiment import Record, read_about

CONFIG = {"seed": 3, "tau_schedule": (2.0, 6.0), "teacher1": {"name": "resnet8"}}


def create(folder, exp_id=""):
    return Record.create(folder / "results", "l1_ib_digits_3", exp_id, CONFIG)


def summary(folder):
    with open(folder / "results" / "summary.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row)) for row in rows]


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    records = [create(tmp_path) for _ in range(5)]
    assert len({record.folder for record in records}) == 5
    assert all(record.folder.name.startswith("l1_ib_digits_3_20") for record in records)
    assert json.loads((records[4].folder / "config.json").read_text()) == CONFIG | {"tau_schedule": [2.0, 6.0]}
    assert {path.name for path in records[0].folder.iterdir()} == {
        "config.json",
        "about.json",
        "metrics.json",
        "log.txt",
        "checkpoints",
        ".lock",
        ".reserve",
    }


def test_a_digest_stands_before_the_time(tmp_path):
    record = Record.create(tmp_path / "results", "l1_ib_digits_3", "", CONFIG, "3fa9")
    assert record.folder.name.startswith("l1_ib_digits_3_3fa9_20") and record.name == "l1_ib_digits_3"


def test_explicit_exp_id_is_kept_and_never_reused(tmp_path):
    assert create(tmp_path, "mine").folder == tmp_path / "results" / "mine"
    with pytest.raises(UserError, match="exp_id='mine'"):
        create(tmp_path, "mine")
    with pytest.raises(ValueError, match="exp_id='teachers' is the folder of the teachers"):
        create(tmp_path, "teachers")
    with pytest.raises(ValueError, match="exp_id='a/b' must be a folder name"):
        create(tmp_path, "a/b")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["mine"]


def test_metrics_keep_every_key_at_full_precision(tmp_path):
    """The same epoch of another stage is another key; writing one key twice is refused (SPEC 10.12)."""
    record = create(tmp_path)
    record.log("stage1/b/epoch01/val_acc", 1 / 3)
    record.log("stage2/b/epoch01/val_acc", np.float32(0.1))
    record.log("stage2/a/epoch01/share_clipped", jnp.float32(0.25))
    record.log("time/stage1/b", None)
    with pytest.raises(ValueError, match="'stage1/b/epoch01/val_acc' is already 0.333"):
        record.log("stage1/b/epoch01/val_acc", 0.5)
    with pytest.raises(ValueError):
        record.log("curve", np.arange(2))
    record.save()
    assert json.loads((record.folder / "metrics.json").read_text()) == {
        "stage1/b/epoch01/val_acc": 1 / 3,
        "stage2/b/epoch01/val_acc": float(np.float32(0.1)),
        "stage2/a/epoch01/share_clipped": 0.25,
        "time/stage1/b": None,
    }
    assert not list(record.folder.glob("*.tmp"))


def test_summary_stays_rectangular_as_columns_appear(tmp_path):
    first, failed, last = create(tmp_path, "first"), create(tmp_path, "failed"), create(tmp_path, "last")
    first.finish("finished", {"test_acc": 1 / 3})
    failed.finish("failed", {}, error='loss is NaN,\nat "step" 7')
    last.finish("interrupted", {"synergy_acc": np.float64(2 / 3), "test_acc": None})
    common = {"name": "l1_ib_digits_3", "seed": "3"}
    assert summary(tmp_path) == [
        common | {"exp_id": "first", "status": "finished", "error": "", "test_acc": repr(1 / 3), "synergy_acc": ""},
        common
        | {
            "exp_id": "failed",
            "status": "failed",
            "error": 'loss is NaN, at "step" 7',
            "test_acc": "",
            "synergy_acc": "",
        },
        common | {"exp_id": "last", "status": "interrupted", "error": "", "test_acc": "", "synergy_acc": repr(2 / 3)},
    ]
    with pytest.raises(ValueError, match="status='done'.*finished, failed, interrupted"):
        last.finish("done", {})


def test_runs_that_finish_together_all_get_a_row(tmp_path):
    records = [create(tmp_path) for _ in range(12)]
    threads = [
        threading.Thread(target=record.finish, args=("finished", {f"column{i % 3}": i}))
        for i, record in enumerate(records)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = summary(tmp_path)
    assert {row["exp_id"] for row in rows} == {record.folder.name for record in records}
    assert sorted(int(row[f"column{i}"]) for i in range(3) for row in rows if row[f"column{i}"]) == list(range(12))


CROWD = """
import csv, itertools, json, os, pathlib, sys
from asib_jax.record.experiment import Record

results, processes, rows = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def write(process):
    for row in range(rows):
        record = Record.create(results, "name", f"{process}-{row}", {"seed": row})
        for key in range(2):
            record.log(f"{key}", "x" * 5000)
            record.save()
        record.finish("finished", {f"column{process}": row, "long": f"{process}," * 300})

def read():
    for path in results.glob("*/*.json"):  # of "latest", too
        json.loads(path.read_text())
    try:
        header, *found = csv.reader((results / "summary.csv").read_text().splitlines())
    except FileNotFoundError:
        return 0, ()
    assert all(len(row) == len(header) for row in found), found
    return len(found), header

children = []
for process in range(processes):  # before jax has threads
    if not (child := os.fork()):
        try:
            write(process)
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
seen, waiting = [read()], set(children)
while waiting:
    for child in list(waiting):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, child
            waiting.remove(child)
    seen.append(read())
for (before, old), (after, new) in itertools.pairwise(seen):
    assert before <= after and set(old) <= set(new)
print(len({count for count, _ in seen}))
"""


def test_rows_of_many_processes_are_neither_lost_nor_torn(tmp_path):
    """Eight, of 50 rows each. A reader that polls meanwhile finds whole files, of a table that only grows."""
    processes, rows = 8, 50
    done = subprocess.run(
        [sys.executable, "-c", CROWD, tmp_path, str(processes), str(rows)],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).resolve().parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2  # sizes that the reader saw
    with open(tmp_path / "summary.csv", newline="") as file:
        found = {row["exp_id"]: row for row in csv.DictReader(file)}
    assert found.keys() == {f"{process}-{row}" for process in range(processes) for row in range(rows)}
    for exp_id, row in found.items():
        process, number = exp_id.split("-")
        assert row["seed"] == row[f"column{process}"] == number and row["long"] == f"{process}," * 300
        assert not any(row[f"column{other}"] for other in range(processes) if str(other) != process)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffexp_id;name\nearlier;mine\n",
        "exp_id,name\nearlier\n",
        "exp_id,name\nearlier,mine,more\n",
        "name\nmine\n",
        "",
    ],
)
def test_a_table_that_is_not_ours_is_put_aside(text, tmp_path, caplog):
    """As spreadsheets and hands leave it; no run is lost for it. Its byte-order mark alone does no harm."""
    record, table = create(tmp_path, "run"), tmp_path / "results" / "summary.csv"
    table.write_text(text, encoding="utf-8")
    record.finish("finished", {"test_acc": 0.5})
    assert [row["exp_id"] for row in summary(tmp_path)] == ["run"]
    (aside,) = table.parent.glob("summary.csv.*.unreadable")
    assert aside.read_text(encoding="utf-8") == text and str(aside) in caplog.text


@pytest.mark.parametrize("key, value", [("data_sha256", [1]), ("told_by_data", "x"), ("begun", "yesterday")])
def test_an_about_json_of_other_types_is_damaged_and_one_that_an_editor_saved_is_not(key, value, tmp_path):
    folder = Record.create(tmp_path, "one_0", "", {"seed": 0}).folder
    text = (folder / "about.json").read_text()
    (folder / "about.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_about(folder) == json.loads(text)
    (folder / "about.json").write_text(json.dumps({**json.loads(text), key: value}))
    with pytest.raises(UserError, match="about.json is damaged"):
        read_about(folder)


@pytest.mark.parametrize("make", [pathlib.Path.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_in_place_of_the_table_is_put_aside(make, tmp_path, caplog):
    make(tmp_path / "summary.csv")
    record = Record.create(tmp_path, "one_0", "", {"seed": 0})
    record.finish("finished", {})
    (row,) = csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())
    assert row["exp_id"] == record.folder.name and "is no table of runs" in caplog.text


@pytest.mark.parametrize(
    "results, exp_id, wrong",
    [
        ("", "lr[0.1]", "for [ in"),
        ("every*run?", "", "for * and ? in"),
        ("\udcff", "", "bytes that are no UTF-8"),
        ("nowhere", "", "no run can be recorded there"),  # a link to nothing
    ],
)
def test_a_folder_in_which_nothing_could_be_kept_is_refused(results, exp_id, wrong, tmp_path):
    (tmp_path / "nowhere").symlink_to("nothing")
    with pytest.raises(UserError, match=re.escape(wrong)):
        Record.create(tmp_path / results, "one_0", exp_id, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["nowhere"]


def test_a_table_with_a_byte_order_mark_goes_on(tmp_path):
    record, table = create(tmp_path, "run"), tmp_path / "results" / "summary.csv"
    table.write_text("\ufeffexp_id,name\nearlier,mine\n", encoding="utf-8")
    record.finish("finished", {})
    assert [row["exp_id"] for row in summary(tmp_path)] == ["earlier", "run"]


def test_a_run_that_went_on_replaces_its_row_and_a_new_one_of_that_name_does_not(tmp_path):
    create(tmp_path, "run").finish("interrupted", {})
    Record.reopen(tmp_path / "results" / "run", CONFIG).finish("failed", {}, "later")
    assert [row["status"] for row in summary(tmp_path)] == ["failed"]
    shutil.rmtree(tmp_path / "results" / "run")
    create(tmp_path, "run").finish("finished", {})
    assert [row["status"] for row in summary(tmp_path)] == ["failed", "finished"]


FULL = """
import itertools, json, pathlib, sys
from asib_jax.record.experiment import Record

results = pathlib.Path(sys.argv[1])
record = Record.create(results, "test_0", "run", {"seed": 0})
record.log("loss", 0.5)
try:
    with open(results / "of somebody else", "wb") as file:
        for _ in itertools.count():
            file.write(bytes(4096))
            file.flush()
except OSError:
    pass
try:
    record.save()
except OSError as error:
    record.finish("failed", {}, str(error))
print(json.loads((results / "run" / "about.json").read_text())["status"], *(results / "run").glob("*.tmp"))
print((results / "summary.csv").read_text())
"""


def test_on_a_full_disk_a_run_is_on_record_as_failed(tmp_path):
    """By room that it has kept for that; nothing half written stays."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare to mount a small file system")
    mounted = 'mount -t tmpfs -o size=300k tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, tmp_path, sys.executable, "-c", FULL, tmp_path],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).resolve().parents[1],
    )
    assert done.returncode == 0, done.stderr
    status, header, row = done.stdout.split("\n")[:3]
    assert status == "failed" and row.startswith("run,test_0,failed,0,[Errno 28] No space left on device"), header


def test_latest_follows_the_run_that_finished_last(tmp_path):
    first, second = create(tmp_path, "first"), create(tmp_path, "second")
    for record in (second, first):
        record.log("test_acc", 0.5)
        record.finish("finished", {})
        assert (tmp_path / "results" / "latest").resolve() == record.folder.resolve()
    tmp_path.joinpath("results").rename(tmp_path / "moved")
    assert json.loads((tmp_path / "moved" / "latest" / "metrics.json").read_text()) == {"test_acc": 0.5}


def test_latest_is_a_text_file_where_a_link_is_not_possible(tmp_path):
    record = create(tmp_path, "first")
    (tmp_path / "results" / "latest").mkdir()
    record.finish("finished", {})
    assert (tmp_path / "results" / "latest.txt").read_text() == "first\n"
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "first",
        "latest",
        "latest.txt",
        "summary.csv",
        ".summary.csv.lock",
    }
