"""The record of a run on disk (SPEC 7): its folder, its metrics and its row in `summary.csv`."""
import csv
import fcntl
import io
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from asib_jax import hosts
from asib_jax.errors import UserError

TEACHERS = "teachers"  # the folder of results_dir that belongs to no run
STATUSES = ("finished", "failed", "interrupted")


class Record:
    """One run: `folder` holds config.json, metrics.json, log.txt and checkpoints/; `metrics` maps keys to scalars."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]):
        self.folder, self.name, self.config = folder, name, config
        self.metrics: dict[str, Any] = {}

    @classmethod
    def create(cls, results_dir: str | os.PathLike, name: str, exp_id: str, config: dict[str, Any]) -> "Record":
        """Make the folder `results_dir/exp_id` with the resolved config, a dict of plain values that has a `seed`.

        `name` is config_profile_seed. With an empty `exp_id` the folder is called name_timestamp, and runs that start
        within the same second get different ones. Of several hosts the first alone has a record that is written.

        Raises:
            UserError: the errors of `check_exp_id`, or `results_dir` cannot be written: nothing new is left in it.
        """
        check_exp_id(results_dir, exp_id)
        if not hosts.is_first():
            return _Unwritten(Path(results_dir) / (exp_id or name), name, config)
        text = json.dumps(config, indent=2)  # before the folder exists: a config that cannot be written leaves no trace
        record = None
        try:
            record = cls(_new_folder(Path(results_dir), name, exp_id), name, config)
            _write(record.folder / "config.json", text)
            (record.folder / "checkpoints").mkdir()
            (record.folder / "log.txt").touch()
            record.save()
        except OSError as error:  # not a folder, read-only, full
            if record is not None:
                shutil.rmtree(record.folder)
            raise UserError(f"results_dir={str(results_dir)!r}: no run can be recorded there: {error}") from error
        return record

    def log(self, key: str, value: Any) -> None:
        """Store a scalar under a slash key such as `stage2/b/epoch07/val_acc`; timings belong under `time/`.

        Raises:
            ValueError: the key was logged before, or the value is an array of several elements.
        """
        if key in self.metrics:
            raise ValueError(f"metric {key!r} is already {self.metrics[key]}; keys carry stage, step and epoch")
        self.metrics[key] = _plain(value)

    def save(self) -> None:
        """Write metrics.json; a reader finds the old or the new file, never a part of one."""
        _write(self.folder / "metrics.json", json.dumps(self.metrics, indent=2))

    def finish(self, status: str, summary: dict[str, Any], error: str = "") -> None:
        """Write the metrics, add the run's row to `results_dir/summary.csv` and point `latest` at its folder.

        The row holds exp_id, name, status, seed, `error` and the fields of `summary` at full precision. A figure that
        was not measured is left out or None and becomes an empty cell, never 0: a failed run has no accuracy.
        """
        if status not in STATUSES:
            raise ValueError(f"status={status!r}: choose one of {', '.join(STATUSES)}")
        self.save()
        row = {"exp_id": self.folder.name, "name": self.name, "status": status, "seed": self.config["seed"],
               "error": " ".join(error.split()), **{key: _plain(value) for key, value in summary.items()}}
        _add_row(self.folder.parent / "summary.csv", row)
        _point_latest(self.folder)


class _Unwritten(Record):
    """That of a host which is not the first; its `folder` is only a name."""

    def save(self) -> None:
        """Nothing."""

    def finish(self, status: str, summary: dict[str, Any], error: str = "") -> None:
        """Nothing."""


def check_exp_id(results_dir: str | os.PathLike, exp_id: str) -> None:
    """UserError if a run called `exp_id` exists, or that is not the name of a folder, or the name of the teachers'."""
    if exp_id != Path(exp_id).name:
        raise UserError(f"exp_id={exp_id!r} must be a folder name, not a path; results_dir says where it goes")
    if exp_id == TEACHERS:
        raise UserError(f"exp_id={exp_id!r} is the folder of the teachers that are kept; choose another")
    if exp_id and (Path(results_dir) / exp_id).exists():
        raise UserError(_taken(Path(results_dir) / exp_id))


def _taken(folder: Path) -> str:
    return f"exp_id={folder.name!r}: {folder} exists; choose another, or none for a unique name"


def _new_folder(results: Path, name: str, exp_id: str) -> Path:
    stem = exp_id or f"{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in itertools.count(1):
        folder = results / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if exp_id:  # of two that start at once
                raise UserError(_taken(folder)) from None


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value  # numpy and jax scalars


def _write(path: Path, text: str) -> None:
    """Replace the file at once."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def _add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV table, and to its header the columns that are new. Runs that end together take turns."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        columns, rows = [], []
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                rows, columns = list(reader), list(reader.fieldnames or ())
        text = io.StringIO()
        writer = csv.DictWriter(text, dict.fromkeys([*columns, *row]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        _write(path, text.getvalue())


def _point_latest(folder: Path) -> None:
    """A relative symbolic link `latest` beside the folder, or the name in `latest.txt` where links are not possible."""
    temporary = folder.with_name(f".latest-{folder.name}")
    try:
        os.symlink(folder.name, temporary)
        os.replace(temporary, folder.with_name("latest"))
    except OSError:
        temporary.unlink(missing_ok=True)
        _write(folder.with_name("latest.txt"), folder.name + "\n")
