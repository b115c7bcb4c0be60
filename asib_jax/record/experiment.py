"""The record of a run on disk (SPEC 7): its folder and its metrics."""

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, TextIO

from asib_jax.engine import hosts
from asib_jax.errors import UserError
from asib_jax.record.files import read_json, write
from asib_jax.record.summary import add_row
from asib_jax.weights import checkpoint
from asib_jax.weights.teacher_store import TEACHERS

logger = logging.getLogger("asib_jax")

_OWN_NAMES = ("summary.csv", "latest", "latest.txt")  # of results_dir
_RESERVE, _RESERVED = ".reserve", 65_536  # bytes of the run's folder, freed for what is written at its end
_LONGEST_NAME = 200  # bytes; file systems have 255, and temporary names are longer
# Of about.json, in the run's row too.
_ABOUT = "dataset data student teachers overrides revision device_kind compute_dtype".split()
STATUSES = ("finished", "failed", "interrupted")


class Record:
    """One run: `folder` holds config.json, about.json, metrics.json, log.txt and checkpoints/; `metrics` maps keys to
    scalars, `about` says what the run is and how far it came (its "status").

    The folder is locked as long as the process lives: a second one that would go on with the same run is refused. Of
    several hosts the first alone writes: for the others the folder is only a name.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any]):
        self.folder, self.name, self.config = folder, name, config
        self.metrics: dict[str, Any] = {}
        self.about: dict[str, Any] = {"name": name, "status": "running", "begun": time.time()}
        self._earlier: dict[str, Any] = {}
        self._lock: TextIO | None = None

    @classmethod
    def create(
        cls, results_dir: str | os.PathLike, name: str, exp_id: str, config: dict[str, Any], digest: str = ""
    ) -> "Record":
        """Make the folder `results_dir/exp_id` with the resolved config, a dict of plain values that has a `seed`.

        `name` is config_profile_seed. With an empty `exp_id` the folder is called name_timestamp, or
        name_digest_timestamp, and runs that start within the same second get different ones.

        Raises UserError for the errors of `check_exp_id` and `checkpoint.check_path`, or where `results_dir` cannot be
        written: nothing new is left in it.
        """
        if not hosts.is_first():
            return cls(Path(results_dir) / (exp_id or name), name, config)
        check_exp_id(results_dir, exp_id)
        stem = "_".join(filter(None, (name, digest)))
        checkpoint.check_path(Path(results_dir) / (exp_id or stem))
        text = json.dumps(config, indent=2)  # before the folder exists: a config that cannot be written leaves no trace
        record = None
        try:
            record = cls(_new_folder(Path(results_dir), stem, exp_id), name, config)
            (record.folder / "checkpoints").mkdir()
            (record.folder / "log.txt").touch()
            (record.folder / _RESERVE).write_bytes(os.urandom(_RESERVED))
            write(record.folder / "config.json", text)
            record._lock_folder()
            record.save()
        except OSError as error:  # not a folder, read-only, full
            if record is not None:
                shutil.rmtree(record.folder)
            raise UserError(f"results_dir={str(results_dir)!r}: no run can be recorded there: {error}") from error
        return record

    @classmethod
    def reopen(cls, folder: Path, config: dict[str, Any]) -> "Record":
        """The record of a run that is to go on under `config`; nothing is written before `go_on_from`.

        Raises UserError while another process has the run, or if it has finished.
        """
        record = cls(folder, "", config)
        if hosts.is_first():
            record._lock_folder()
        about = read_about(folder)  # once no other process can change it
        if about["status"] == "finished":
            raise UserError(f"the run {folder} has finished: there is nothing to go on with")
        record.name, record.about = about["name"], about | {"status": "running", "resumed": about.get("resumed", 0) + 1}
        return record

    def _lock_folder(self) -> None:
        self._lock = open(self.folder / ".lock", "a+")  # noqa: SIM115  # held as long as the process lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise UserError(
                f"the run {self.folder} is going on in another process ({self._lock.read().strip()}); end that first"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._lock.flush()

    def go_on_from(self, metrics: dict[str, Any]) -> None:
        """Take up the metrics that an interrupted run had logged. What is logged once more must be equal."""
        self.metrics, self._earlier = dict(metrics), dict(metrics)
        if hosts.is_first():
            (self.folder / _RESERVE).write_bytes(os.urandom(_RESERVED))
            write(self.folder / "config.json", json.dumps(self.config, indent=2))
        self.save()

    def confirm(self, key: str, value: str, what: str) -> None:
        """Log a digest; UserError if the run had another one before it was interrupted. what: what it is of."""
        if self._earlier.get(key, value) != value:
            raise UserError(f"{what} is not what this run began with: its SHA-256 is {value}, not {self._earlier[key]}")
        self.log(key, value)

    def log(self, key: str, value: Any) -> None:
        """Store a scalar under a slash key such as `stage2/b/epoch07/val_acc`; timings belong under `time/`.

        Raises ValueError where the key was logged before, or the value is an array of several elements.
        """
        if key in self.metrics and not (key in self._earlier and self._earlier[key] == _plain(value)):
            raise ValueError(f"metric {key!r} is already {self.metrics[key]}; keys carry stage, step and epoch")
        self.metrics[key] = _plain(value)

    def save(self) -> None:
        """Write metrics.json and about.json; a reader finds the old or the new file, never a part of one."""
        if hosts.is_first():
            write(self.folder / "about.json", json.dumps(self.about, indent=2))
            write(self.folder / "metrics.json", json.dumps(self.metrics, indent=2))

    def finish(self, status: str, summary: dict[str, Any], error: str = "") -> None:
        """Write the metrics, put the run's row into `results_dir/summary.csv`, point `latest` at its folder, unlock it.

        The row holds exp_id, name, status, seed, `error` and the fields of `summary` at full precision. A figure that
        was not measured is left out or None and becomes an empty cell, never 0: a failed run has no accuracy.
        """
        if status not in STATUSES:
            raise ValueError(f"status={status!r}: choose one of {', '.join(STATUSES)}")
        if not hosts.is_first():
            return
        self.about |= {"status": status, "ended": time.time()}
        (self.folder / _RESERVE).unlink(missing_ok=True)
        self.save()
        row = {
            "exp_id": self.folder.name,
            "name": self.name,
            "status": status,
            "seed": self.config["seed"],
            "error": " ".join(error.split()),
            **{key: self.about[key] for key in _ABOUT if key in self.about},
            **{key: _plain(value) for key, value in summary.items()},
        }
        _point_latest(self.folder)
        add_row(self.folder.parent / "summary.csv", row, replace="resumed" in self.about)
        self._lock.close()


def check_exp_id(results_dir: str | os.PathLike, exp_id: str) -> None:
    """UserError if a run called `exp_id` exists, or that cannot name a run's folder; "" leaves the name to the run."""
    if (
        exp_id != Path(exp_id).name
        or exp_id.startswith(".")
        or not exp_id.isprintable()
        or len(exp_id.encode()) > _LONGEST_NAME
    ):
        raise UserError(
            f"exp_id={exp_id!r} must be a folder name, not a path, of printable characters, "
            f"{_LONGEST_NAME} bytes at most, and not begin with a dot; results_dir says where it goes"
        )
    if exp_id in (TEACHERS, *_OWN_NAMES):
        raise UserError(
            f"exp_id={exp_id!r} is the folder of the teachers that are kept, or another name that "
            "results_dir has a use for; choose another"
        )
    if exp_id and (Path(results_dir) / exp_id).exists():
        raise UserError(_taken(Path(results_dir) / exp_id))


def _taken(folder: Path) -> str:
    return f"exp_id={folder.name!r}: {folder} exists; choose another, or none for a unique name"


def _new_folder(results: Path, name: str, exp_id: str) -> Path:
    stem = exp_id or f"{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder, attempt = results / stem, 1
    try:
        results.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(results)) from None
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if exp_id:  # of two that start at once
                raise UserError(_taken(folder)) from None
        attempt += 1
        folder = results / f"{stem}-{attempt}"


def _plain(value: Any) -> Any:
    """A plain scalar of numpy's or jax's; None for what is no number, which JSON and tables cannot hold."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_about(folder: Path) -> dict[str, Any]:
    """What about.json says of the run in `folder`. The errors of `read_json`."""
    about = read_json(folder / "about.json")
    try:
        kinds = {"name": str, "status": str, "begun": float, "data_sha256": dict, "told_by_data": dict}
        return about | {key: kind(about[key]) for key, kind in kinds.items() if kind is not dict or key in about}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'about.json'} is damaged: {error}") from error


def _point_latest(folder: Path) -> None:
    """A relative symbolic link `latest` beside the folder, or the name in `latest.txt` where links are not possible."""
    temporary, latest = folder.with_name(f".latest-{folder.name}"), folder.with_name("latest")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed here
        os.symlink(folder.name, temporary)
        os.replace(temporary, latest)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        write(folder.with_name("latest.txt"), folder.name + "\n")
        logger.warning("%s cannot be a link to this run (%s): its name is in latest.txt", latest, error)
