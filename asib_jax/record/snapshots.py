"""Snapshots of a run on its way, from which it goes on bit for bit after whatever ended it.

Where a start comes from, the first of these that applies:
  1. `--resume` or `resume`: the run that `resume.find` names, from
     a. its last snapshot that is whole: the parts before are `over` and are not done again; what they left is in the
        snapshot or, of teachers, in `teacher_store`;
     b. its very beginning, where it had not come to a snapshot;
  2. the beginning of a new run: teachers as `teachers.collect` finds them, the student from `model.student.weights` or
     drawn at random, fusion network and adapters drawn at random.
Everything random derives from the seed and a position, so that a snapshot needs nothing but arrays, the position, the
sums of the epoch under way and what was best so far.
"""

import concurrent.futures
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from asib_jax.engine import hosts
from asib_jax.errors import UserError
from asib_jax.record.experiment import Record
from asib_jax.record.signals import Interrupted, Stop
from asib_jax.weights import checkpoint

logger = logging.getLogger("asib_jax")

_FORMAT = 4  # raised whenever what a snapshot holds changes its names
_KEPT = 2  # the last, and one before it should that be damaged


class Snapshot(NamedTuple):
    """arrays: nested dicts of numpy arrays, without empty ones; values: plain values of the part of the run; epoch: of
    the part, from 0; tally: what its steps have come to, as `Tally` has it. The rest is the whole run's: its
    metrics, the teachers that it trains itself, the seconds it has taken; number: of the snapshot."""

    part: str
    epoch: int
    tally: dict[str, Any]
    values: dict[str, Any]
    metrics: dict[str, Any]
    trained: list[str]
    seconds: float
    number: int
    arrays: dict[str, Any]


class Snapshots:
    """Takes the snapshots of one run; written in the background, so that training waits for a copy alone.

    A run is a sequence of parts ("teacher1", "stage1/a", ...), each of which asks `over` and `take` first.
    stop: asks for the last one. minutes, steps: how often (0: not by this). last: the one to go on from.
    """

    def __init__(
        self,
        record: Record,
        stop: Stop | None = None,
        *,
        minutes: float = 0,
        steps: int = 0,
        last: Snapshot | None = None,
    ):
        self.steps = steps  # at most so many between two
        self.trained: list[str] = last.trained if last else []
        self.resumed = last is not None
        self._record, self._stop, self._last = record, stop or Stop(), last
        self._seconds, self._taken, self._done = 60 * minutes, time.monotonic(), 0
        self._begun = time.monotonic() - (last.seconds if last else 0)
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None
        self._whole = [last.number] if last else []  # of those on disk

    def over(self, part: str) -> bool:
        """Whether the snapshot to go on from is of a later part than `part`, which then is not to be done again."""
        return self._last is not None and self._last.part != part

    @property
    def ahead(self) -> str:
        """The part to go on in; "" from there on, and in a run that was never interrupted."""
        return self._last.part if self._last else ""

    def take(self, part: str) -> Snapshot | None:
        """The snapshot that `part` goes on from, once; None if it begins."""
        if self.ahead != part:
            return None
        last, self._last = self._last, None
        logger.info("going on in %s, epoch %d, after %d steps", part, last.epoch + 1, last.tally["steps"])
        return last

    @property
    def seconds(self) -> float:
        """That the run has taken, without what its interruptions cost."""
        return time.monotonic() - self._begun

    def offer(
        self,
        part: str,
        epoch: int,
        tally: dict[str, Any],
        steps: int,
        content: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
        now: bool = False,
    ) -> None:
        """Take a snapshot if it is time, `now`, or the run has been asked to stop: then raise Interrupted.

        steps: since the last offer. content: gives its arrays (any tree) and values. Every host calls this alike.
        """
        self._done += steps
        (stops,) = hosts.anywhere([bool(self._stop.asked)])
        by_time = self._seconds and time.monotonic() - self._taken >= self._seconds
        by_steps = self.steps and self._done >= self.steps
        if not (now or stops or by_time or by_steps):
            return
        self._taken, self._done = time.monotonic(), 0
        if hosts.is_first():
            self._save(part, epoch, tally, *content())
        if stops:
            self.close()
            hosts.anywhere([True])  # none leaves, and has the others ended, before the snapshot is on disk
            at = f"; --resume goes on from {self.newest() or 'the beginning'}" if hosts.is_first() else ""
            raise Interrupted(
                f"by {self._stop.asked or 'a signal to another host'} in {part}, epoch {epoch + 1}, after "
                f"{tally['steps']} steps{at}"
            )

    def _save(self, part: str, epoch: int, tally: dict, arrays: Any, values: dict) -> None:
        self._wait()  # for the one before
        # Copied: the next step may take the memory of what it is given, and numpy's view of it would change.
        tree = jax.tree.map(np.array, jax.device_get(_pruned(serialization.to_state_dict(arrays))))
        about = json.dumps(
            {
                "format": _FORMAT,
                "part": part,
                "epoch": epoch,
                "tally": tally,
                "values": values,
                "trained": self.trained,
                "metrics": self._record.metrics,
                "seconds": self.seconds,
            }
        )
        newest = self.newest()
        number = int(newest.name) + 1 if newest else 1
        self._writing = self._writer.submit(self._write, number, tree, about)

    def _write(self, number: int, tree: dict[str, Any], about: str) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not np.isfinite(leaf).all():  # a run that breaks must not break what it can go on from
                raise ValueError(f"{jax.tree_util.keystr(path)} is not finite; the snapshot before stays the last")
        home = folder(self._record.folder)
        checkpoint.save(home / f"{number:06d}", tree, about)
        self._whole = [*self._whole, number][-_KEPT:]
        for old in home.iterdir():  # damaged ones too, and what a process that was killed had begun to write
            if old.name not in {f"{kept:06d}" for kept in self._whole}:
                shutil.rmtree(old, ignore_errors=True)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except Exception as error:  # a full disk ends no run of days; the snapshot before still serves
            logger.warning("no snapshot could be written: %s: %s", type(error).__name__, error)

    def newest(self) -> Path | None:
        """The folder of the newest snapshot."""
        found = paths(self._record.folder)
        return found[-1] if found else None

    def close(self) -> None:
        """Wait for what is being written."""
        self._wait()
        self._writer.shutdown()

    def remove(self) -> None:
        """From disk, all of them: the run has finished."""
        self.close()
        if hosts.is_first():
            shutil.rmtree(folder(self._record.folder), ignore_errors=True)


def folder(run: Path) -> Path:
    """Where the snapshots of the run in that folder are."""
    return run / "checkpoints" / "snapshots"


def paths(run: Path) -> list[Path]:
    """The snapshots of a run, the newest last; whether they are whole is not looked at."""
    return sorted(path for path in folder(run).glob("*") if path.name.isdigit())


def last_whole(run: Path) -> Snapshot | None:
    """The newest snapshot of a run that can be read, or None if it never came to one.

    Warns of each that cannot, naming the one that is used instead. Raises UserError where none can.
    """
    damaged: list[UserError] = []
    for path in reversed(paths(run)):
        try:
            arrays, about = checkpoint.restore_with_text(path)
        except UserError as error:
            damaged.append(error)
            continue
        for one in damaged:
            logger.warning("%s; going on from the one before, %s", one, path)
        held = json.loads(about)
        if held.pop("format", 1) != _FORMAT:
            raise UserError(
                f"the snapshot {path} was written by another version of this code, which can go on with it: about.json "
                "of the run has its revision. Or begin a new run; teachers that are kept are not trained again"
            )
        return Snapshot(**held, number=int(path.name), arrays=arrays)
    if damaged:
        raise UserError(
            f"no snapshot of {run} is whole: {'; '.join(map(str, damaged))}. Start a new run; teachers that "
            "are kept are not trained again"
        )
    return None


def _pruned(tree: Any) -> Any:
    """Nested dicts without empty branches and without None, neither of which a checkpoint keeps."""
    if not isinstance(tree, dict):
        return tree
    branches = {str(name): _pruned(branch) for name, branch in tree.items() if branch is not None}
    return {name: branch for name, branch in branches.items() if not (isinstance(branch, dict) and not branch)}
