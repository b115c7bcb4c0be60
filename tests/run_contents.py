"""What a run called "run" leaves in its results folder, and whether two of them left the same."""

import csv
import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np

from asib_jax.weights import checkpoint


def contents(folder: Path) -> list[dict[str, Any]]:
    """All checkpoints, the teachers' too; the metrics but for times; the run's only row, but for its minutes."""
    found = {
        str(path.parent.relative_to(folder)): checkpoint.restore(path.parent)
        for path in folder.rglob("_CHECKPOINT_METADATA")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }  # half a teacher, at a kill
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    with open(folder / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return [
        found,
        {key: value for key, value in metrics.items() if not key.startswith("time/")},
        {key: value for key, value in row.items() if key != "minutes"},
    ]


def assert_same(a: Path, b: Path) -> None:
    """AssertionError unless every array and figure of the two is the same, bit for bit."""
    for mine, other in zip(contents(a), contents(b), strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            assert jax.tree.structure(mine[key]) == jax.tree.structure(other[key]), key
            for x, y in zip(jax.tree.leaves(mine[key]), jax.tree.leaves(other[key])):
                np.testing.assert_array_equal(x, y, err_msg=str(key))


def events(folder: Path) -> list[Any]:
    """All of the run's TensorBoard files: records framed by length and checksums."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content, start = file.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            found.append(Event.FromString(content[start + 12 : start + 12 + length]))
            start += length + 16
    return found


def points(folder: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of every point of its curves."""
    values = [(event.step, value) for event in events(folder) for value in event.summary.value]
    return [(value.tag, step, value.simple_value) for step, value in values if value.HasField("simple_value")]
