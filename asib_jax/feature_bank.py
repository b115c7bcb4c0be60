"""Outputs of the frozen teachers, computed once and served as data.

The evaluation splits are always read this way; training images when `teacher_views` = V asks for V fixed augmented
views of each. The outputs are those before any adapter, so that adapters may go on training.
"""
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from asib_jax import parallel
from asib_jax.data.augment import augment
from asib_jax.data.batches import evaluation_batches
from asib_jax.data.sources import Split
from asib_jax.models.ensemble import Networks, TeacherOutputs, Variables, run_teachers

logger = logging.getLogger("asib_jax")


class Bank(NamedTuple):
    """feats: one [V, N, F_k] per teacher; logits [V, N, T, C]; float32 on the host, rows as in the split."""

    feats: tuple[np.ndarray, ...]
    logits: np.ndarray

    def outputs(self, view: int, rows: np.ndarray) -> TeacherOutputs:
        """The teachers' outputs on the given rows of the split in one view."""
        return TeacherOutputs(tuple(feat[view, rows] for feat in self.feats), self.logits[view, rows])


def build(nets: Networks, variables: Variables, split: Split, *, keys: list[jax.Array], data_aug: int, batch_size: int,
          devices: Sequence[jax.Device], cache: str = "", title: str = "") -> Bank:
    """Run the teachers over `split`, once for the augmentation key of each view.

    cache: a folder; outputs stored there under a digest of weights, images and views are read instead of computed.
    """
    teachers = Variables({name: variables.params[name] for name in nets.teacher_names},
                         {name: variables.batch_stats[name] for name in nets.teacher_names})
    path = None
    if cache:
        digest = _digest(nets, teachers, split, [jax.random.key_data(key) for key in keys], data_aug)
        path = pathlib.Path(cache).expanduser() / f"{digest}.npz"
        if path.exists():
            logger.info("teachers on %s: read from %s", title, path)
            with np.load(path) as stored:
                return Bank(tuple(stored[name] for name in nets.teacher_names), stored["logits"])
    logger.info("teachers on %s: %d images, %d view(s)", title, len(split.label), len(keys))
    bank = _run(nets, teachers, split, keys, data_aug, batch_size, devices)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, logits=bank.logits, **dict(zip(nets.teacher_names, bank.feats)))
        part.replace(path)
    return bank


def _run(nets, teachers, split, keys, data_aug, batch_size, devices) -> Bank:
    compiled = _reader(nets, data_aug, tuple(devices))
    teachers = parallel.replicate(teachers, devices)
    views = []
    for key in keys:
        batches = [jax.device_get(compiled(teachers, key, parallel.shard(batch, devices)))
                   for batch in evaluation_batches(split, batch_size)]
        views.append(jax.tree.map(lambda *parts: np.concatenate(parts)[: len(split.label)], *batches))
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *views)
    return Bank(stacked.feats, stacked.logits)


@functools.lru_cache(maxsize=4)  # one compilation for all the splits of a run
def _reader(nets: Networks, data_aug: int, devices: tuple[jax.Device, ...]):
    axis = parallel.axis_name(devices)

    def read(variables, key, batch):
        outputs, _ = run_teachers(nets, variables, augment(key, batch["index"], batch["image"], data_aug))
        return outputs if axis is None else jax.lax.all_gather(outputs, axis, tiled=True)

    return parallel.compile_step(read, devices, arguments=3)


def _digest(nets: Networks, teachers: Variables, split: Split, keys: list, data_aug: int) -> str:
    digest = hashlib.sha256(f"{data_aug} {jax.__version__}".encode())  # the version: its random streams
    for model in nets.teachers:  # what the variables do not say: preprocessing and arithmetic
        digest.update(f"{model.mean}{model.std}{model.dtype}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(teachers):
        if "distill_adapter" not in jax.tree_util.keystr(path):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
    for array in (*split, *keys):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def correct_counts(bank: Bank, labels: np.ndarray) -> dict[str, int]:
    """Correct predictions in the first view of every teacher, "teacher1" ..., and of their averaged logits, "average";
    and the images on which their predictions differ, "disagreement"."""
    logits = bank.logits[0]
    predictions = _predictions(logits)  # [N, T]
    counts = {f"teacher{k}": int((predictions[:, k - 1] == labels).sum()) for k in range(1, logits.shape[1] + 1)}
    counts["average"] = int((_predictions(logits.mean(axis=1)) == labels).sum())
    counts["disagreement"] = int((predictions != predictions[:, :1]).any(axis=1).sum())
    return counts


def _predictions(logits: np.ndarray) -> np.ndarray:
    """The class of each row of logits [..., C]; -1, which is none, where one is not finite."""
    return np.where(np.isfinite(logits).all(axis=-1), logits.argmax(axis=-1), -1)
