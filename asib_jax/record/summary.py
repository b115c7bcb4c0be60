"""`results_dir/summary.csv`, the table of all runs there: one row each, whoever ends at the same time."""

import csv
import fcntl
import io
import logging
import os
import time
from pathlib import Path
from typing import Any

from asib_jax.record.files import write

logger = logging.getLogger("asib_jax")


def add_row(path: Path, row: dict[str, Any], replace: bool) -> None:
    """Put a row into a CSV table, and into its header the columns that are new. Runs that end together take turns; a
    process that dies leaves no lock behind.

    replace: in the place of the last one with the same exp_id, if there is one.
    """
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        columns, rows = _read_table(path)
        alike = [place for place, other in enumerate(rows) if other["exp_id"] == row["exp_id"]] if replace else []
        place = alike[-1] if alike else len(rows)
        rows[place : place + 1] = [row]
        text = io.StringIO()
        writer = csv.DictWriter(text, dict.fromkeys([*columns, *row]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(path, text.getvalue())


def _read_table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows; none where there is no table. One that is not ours any more (a spreadsheet may have saved it
    with other separators) is put aside with a warning: a run that ends must not be lost for it."""
    if not path.exists():
        return [], []
    columns, rows = [], []
    try:
        if path.is_file():  # and no folder, nor a pipe that would be waited for
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                columns, rows = list(reader.fieldnames or ()), list(reader)
        if "exp_id" in columns and all(None not in other and None not in other.values() for other in rows):
            return columns, rows
    except (UnicodeDecodeError, csv.Error):
        pass
    aside = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.unreadable")
    os.replace(path, aside)
    logger.warning("%s is no table of runs: it is %s now, and a new one begins", path, aside)
    return [], []
