"""Teachers trained here, kept between runs under all that made them what they are.

`results_dir/teachers/<network>_<dataset>_seed<seed>_<digest>/` holds key.json, the readable key that the digest is of,
and the checkpoint of the backbone and classifier. Nothing else decides which teacher a run takes.
"""
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from asib_jax import checkpoint, weights
from asib_jax.data.sources import Split
from asib_jax.recipe import Recipe

logger = logging.getLogger("asib_jax")

# A teacher's own keys that act only after it is ready, only from scratch, and only on given weights.
_LATER = {"saw_val", "freeze_level", "freeze_bn"}
_SCRATCH = {"train_epochs", "train_lr", "train_weight_decay"}
_FINETUNING = {"finetune_epochs", "finetune_lr", "finetune_weight_decay", "finetune_freeze_level"}


def streams_name(recipe: Recipe, k: int) -> str:
    """What the random streams of teacher `k` (from 0) are called: its network, numbered from the second of its kind.

    Not its place, so that the same teacher is the same whichever of teacher1, teacher2, ... it is.
    """
    name = recipe.teachers[k].name
    earlier = sum(teacher.name == name for teacher in recipe.teachers[:k])
    return f"teacher/{name}" + (f"/{earlier + 1}" if earlier else "")


def key(recipe: Recipe, k: int) -> dict[str, Any] | None:
    """All that decides the variables of teacher `k` (from 0) after its training here, as plain values.

    None if it cannot be told, because its given weights have not been downloaded.
    """
    teacher, data = recipe.teachers[k], recipe.dataset
    given = weights.cached(teacher.weights) if teacher.weights else None
    if teacher.weights and given is None:
        return None
    idle = _LATER | (_SCRATCH if teacher.weights else _FINETUNING)
    own = {name: value for name, value in dataclasses.asdict(teacher).items() if name not in idle}
    return {
        "teacher": own | {"weights": f"sha256:{weights.digest(given)}" if given else ""},
        "streams": streams_name(recipe, k), "seed": recipe.seed, "dtype": recipe.compute_dtype,
        "dataset": {"name": data.name, "path": data.path if data.name in ("npz", "folder") else "",
                    "val_fraction": data.val_fraction, "data_aug": data.data_aug, "batch_size": data.batch_size,
                    "small_input": data.small_input},
        "schedule": dataclasses.asdict(recipe.schedule) | {"lr_warmup_epochs": teacher.warmup_epochs},
        "grad_clip_norm": recipe.grad_clip_norm,
    }


def folder(recipe: Recipe, k: int) -> pathlib.Path | None:
    """Where teacher `k` (from 0) is kept; None as for `key`."""
    made_of = key(recipe, k)
    if made_of is None:
        return None
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{recipe.teachers[k].name}_{recipe.dataset.name}_seed{recipe.seed}_{digest}"
    return pathlib.Path(recipe.results_dir) / "teachers" / name


def load(path: pathlib.Path, train: Split) -> dict[str, Any] | None:
    """The variables kept in `path`; None if there is no such teacher.

    Raises ValueError if it was trained on other images than `train`, or the checkpoint is damaged.
    """
    if not (path / "checkpoint").exists():
        return None
    trained_on = json.loads((path / "key.json").read_text())["images"]
    if trained_on != images_digest(train):
        raise ValueError(f"the teacher in {path} was trained on other images of the same dataset.name: use another "
                         "results_dir, or move that folder away")
    stored = checkpoint.restore(path / "checkpoint")
    return {"params": stored["params"], "batch_stats": stored.get("batch_stats", {})}


def save(recipe: Recipe, k: int, variables: dict[str, Any], train: Split, measured: dict[str, float]) -> None:
    """Keep a trained teacher; its folder appears complete or not at all.

    A run that trained the same one at the same time may have been first: then that one stays.
    """
    path = folder(recipe, k)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.mkdir(parents=True)
    backbone = {name: leaves for name, leaves in variables["params"].items() if name != "distill_adapter"}
    checkpoint.save(part / "checkpoint", {"params": backbone, "batch_stats": variables["batch_stats"]})
    text = json.dumps({**key(recipe, k), "images": images_digest(train), "measured": measured}, indent=2)
    (part / "key.json").write_text(text, encoding="utf-8")
    try:
        part.rename(path)
    except OSError:
        shutil.rmtree(part)
        logger.warning("%s was there already; this run goes on with the teacher it trained itself", path)


def images_digest(split: Split) -> str:
    """SHA-256 of the images and labels of a split, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (split.image, split.label):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
