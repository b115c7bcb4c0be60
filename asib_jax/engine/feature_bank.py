"""Outputs of frozen networks on a split, computed once and served as data.

The teachers' on the evaluation splits are always read this way; on training images, and the student's, where a number
of fixed views is asked for (`stored_views`). Outputs are those before any adapter, so that adapters may go on training.
"""
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from asib_jax.engine import hosts, parallel
from asib_jax.data import archives
from asib_jax.data.augment import augment
from asib_jax.data.batches import evaluation_rows
from asib_jax.data.sources import Split, blocks
from asib_jax.errors import UserError
from asib_jax.engine.feed import Feed, Steps, on_host
from asib_jax.models.ensemble import Networks, StudentOutputs, TeacherOutputs, Variables, run_student, run_teachers

logger = logging.getLogger("asib_jax")

View = TeacherOutputs | StudentOutputs  # on one view of a split: numpy leaves [N, ...], rows as in the split


def read_teachers(nets: Networks, variables: Variables, split: Split, *, keys: Sequence[jax.Array], data_aug: int,
                  batch_size: int, feed: Feed, cache: str = "", title: str = "") -> list[TeacherOutputs]:
    """The teachers over `split`, once for the augmentation key of each view.

    cache: a folder; outputs stored there under a digest of networks, weights, images and view are read instead of
    computed, if all hosts see them; the first stores them. Raises UserError naming a file that cannot be read.
    """
    teachers = _only(variables, nets.teacher_names)
    paths = [None] * len(keys)
    if cache:
        common = _digest(nets, teachers, split, data_aug)
        paths = [pathlib.Path(cache).expanduser() / f"{_of_view(common, key)}.npz" for key in keys]
    stored = hosts.everywhere([path is not None and path.exists() for path in paths])
    views = [_load(path, nets) if there else None for path, there in zip(paths, stored)]
    missing = [position for position, view in enumerate(views) if view is None]
    if len(missing) < len(keys):
        logger.info("teachers on %s: %d of %d view(s) read from %s", title, len(keys) - len(missing), len(keys), cache)
    if missing:
        logger.info("teachers on %s: %d images, %d view(s)", title, len(split.label), len(missing))
        computed = _read(nets, "teachers", teachers, split, [keys[position] for position in missing], data_aug,
                         batch_size, feed)
        for position, view in zip(missing, computed):
            views[position] = view
            if paths[position] and hosts.is_first():
                _store(paths[position], nets, view)
    return views


def read_student(nets: Networks, variables: Variables, split: Split, *, keys: Sequence[jax.Array], data_aug: int,
                 batch_size: int, feed: Feed) -> list[StudentOutputs]:
    """The student in evaluation over `split`, once for the augmentation key of each view."""
    return list(_read(nets, "student", _only(variables, ("student",)), split, keys, data_aug, batch_size, feed))


def _only(variables: Variables, names: Sequence[str]) -> Variables:
    return Variables({name: variables.params[name] for name in names},
                     {name: variables.batch_stats[name] for name in names})


def _read(nets, who, variables, split, keys, data_aug, batch_size, feed):
    """Yields what the networks say of each view."""
    step = _reader(nets, who, data_aug, feed)
    variables = parallel.share(variables, feed.devices)
    examples = on_host(image=split.image, index=split.index)  # one shape and one program for all splits
    rows = evaluation_rows(len(split.label), batch_size)
    for key in keys:
        parts, pending = [], []
        for call in feed.calls(step, rows, examples):
            parts += jax.device_get(pending)  # of the call before, while this one's images were on their way
            pending = [(step.run((), variables, {"augment_key": key}, call, {})[1], call.steps)]
        parts += jax.device_get(pending)
        yield jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(split.label)],
                           *(jax.tree.map(lambda leaf: leaf[:steps].reshape(-1, *leaf.shape[2:]), outputs)
                             for outputs, steps in parts))


@functools.lru_cache(maxsize=8)  # one compilation for all the splits of a run
def _reader(nets: Networks, who: str, data_aug: int, feed: Feed) -> Steps:
    run = run_student if who == "student" else lambda *arguments: run_teachers(*arguments)[0]
    axis = feed.axis_name

    def read(nothing, variables, controls, batch):
        outputs = run(nets, variables, augment(controls["augment_key"], batch["index"], batch["image"], data_aug))
        return nothing, outputs if axis is None else jax.lax.all_gather(outputs, axis, tiled=True)

    return feed.compile(read)


def _digest(nets: Networks, teachers: Variables, split: Split, data_aug: int) -> "hashlib._Hash":
    digest = hashlib.sha256(f"{data_aug} {jax.__version__}".encode())  # the version: its random streams
    pixels = jax.ShapeDtypeStruct((1, *split.image.shape[1:]), np.float32)
    for name, model in zip(nets.teacher_names, nets.teachers):
        variables = teachers.of(name)
        backbone = {part: {child: leaves for child, leaves in branch.items() if child != "distill_adapter"}
                    for part, branch in variables.items()}
        apply = functools.partial(model.clone(adapter_dim=0).apply, train=False)
        digest.update(jax.jit(apply).lower(backbone, pixels).as_text().encode())  # what is computed, and in which type
        for leaf in jax.tree.leaves(backbone):
            digest.update(np.asarray(leaf).tobytes())
    for array in split:
        digest.update(str(array.shape).encode())
        for block in blocks(array):
            digest.update(block)
    return digest


def _of_view(common: "hashlib._Hash", key: jax.Array) -> str:
    digest = common.copy()
    digest.update(np.asarray(jax.random.key_data(key)).tobytes())
    return digest.hexdigest()[:32]


def _store(path: pathlib.Path, nets: Networks, view: TeacherOutputs) -> None:
    """Write one view; a reader finds a whole file or none. Features as bytes: .npz knows no bfloat16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        feats = {name: feat.view(np.uint8) for name, feat in zip(nets.teacher_names, view.feats)}
        np.savez(file, logits=view.logits, **feats)
    part.replace(path)


def _load(path: pathlib.Path, nets: Networks) -> TeacherOutputs:
    try:
        stored = archives.read_npz(path, (*nets.teacher_names, "logits"))
        feats = tuple(stored[name].view(np.dtype(model.dtype))
                      for name, model in zip(nets.teacher_names, nets.teachers))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} (in teacher_cache) cannot be read, delete it: {error}") from error
    return TeacherOutputs(feats, stored["logits"])


def correct_counts(view: TeacherOutputs, labels: np.ndarray) -> dict[str, int]:
    """Correct predictions of every teacher, "teacher1" ..., and of their averaged logits, "average"; and the images on
    which their predictions differ, "disagreement"."""
    logits = view.logits
    predictions = _predictions(logits)  # [N, T]
    counts = {f"teacher{k}": int((predictions[:, k - 1] == labels).sum()) for k in range(1, logits.shape[1] + 1)}
    counts["average"] = int((_predictions(logits.mean(axis=1)) == labels).sum())
    counts["disagreement"] = int((predictions != predictions[:, :1]).any(axis=1).sum())
    return counts


def _predictions(logits: np.ndarray) -> np.ndarray:
    """The class of each row of logits [..., C]; -1, which is none, where one is not finite."""
    return np.where(np.isfinite(logits).all(axis=-1), logits.argmax(axis=-1), -1)
