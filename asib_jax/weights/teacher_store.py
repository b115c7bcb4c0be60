"""Teachers trained here, kept between runs under all that made them what they are.

`results_dir/teachers/<network>_<dataset>_seed<seed>_<digest>/` holds key.json, the readable key that the digest is of,
and the checkpoint of the backbone and classifier. Nothing else decides which teacher a run takes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from asib_jax.data.sources import OWN, Split, images_digest
from asib_jax.engine import hosts
from asib_jax.errors import UserError
from asib_jax.models.ensemble import fold_name
from asib_jax.recipe import Recipe, keys
from asib_jax.weights import checkpoint, origins
from asib_jax.weights.reading import OTHER_ORDER

logger = logging.getLogger("asib_jax")

TEACHERS = "teachers"  # the folder of results_dir that belongs to no run
_RECIPE = 2  # raised whenever the code of a teacher's training changes what comes of it
_LATER = (
    "weights_sha256",
    "saw_val",
    "temperature",
    "freeze_level",
    "freeze_bn",
)  # a teacher's own keys that make it no other
_SINCE = (("classes", ""),)  # keys that came later, with what they were until then


class Copy(NamedTuple):
    """A network that is trained for teacher `k` (from 0). fold: the one (from 0) that it does without; None: none."""

    k: int
    fold: int | None = None

    @property
    def teacher(self) -> str:
        return f"teacher{self.k + 1}"

    @property
    def name(self) -> str:
        """Of its variables and its phase."""
        return self.teacher if self.fold is None else fold_name(self.teacher, self.fold)


def copies(recipe: Recipe) -> list[Copy]:
    """The networks that stand for the recipe's teachers, in the order in which they are trained."""
    folds: list[int | None] = [*range(recipe.folds)]
    each = folds + ([None] if not folds or recipe.teacher_deploy == "all" else [])
    return [Copy(k, fold) for k in range(len(recipe.teachers)) for fold in each]


class Place(NamedTuple):
    """A teacher's folder in the store, and the key that its name is made of."""

    folder: pathlib.Path
    key: dict[str, Any]


def streams_name(recipe: Recipe, k: int, fold: int | None = None) -> str:
    """What the random streams of teacher `k` (from 0) are called: its network and, where it does not know all, its
    classes, numbered from the second of its kind, and of a copy the fold that it does without.

    Not its place, so that the same teacher is the same whichever of teacher1, teacher2, ... it is.
    """
    kinds = [(teacher.name, teacher.classes) for teacher in recipe.teachers]
    (name, classes), earlier = kinds[k], kinds[:k].count(kinds[k])
    parts = [f"classes {classes}" * bool(classes), f"{earlier + 1}" * bool(earlier)]
    return "/".join(filter(None, ["teacher", name, *parts, "" if fold is None else f"fold{fold + 1}"]))


def place(recipe: Recipe, k: int, weights_digest: str, fold: int | None = None) -> Place:
    """Where teacher `k` (from 0) is kept once trained from weights of that SHA-256; "" from scratch. fold: that a copy
    does without.

    The key holds all that decides its variables then, as plain values; of the configuration only what has an effect.
    """
    teacher, data, idle = recipe.teachers[k], recipe.dataset, keys.idle(recipe)
    own = {
        name: value
        for name, value in dataclasses.asdict(teacher).items()
        if name not in _LATER and f"teacher{k + 1}.{name}" not in idle and (name, value) not in _SINCE
    }
    schedule = {
        name: value
        for name, value in dataclasses.asdict(recipe.schedule).items()
        if name != "lr_warmup_epochs" and f"schedule.{name}" not in idle
    }
    source = str(pathlib.Path(data.path).expanduser().resolve()) if data.name in OWN else ""
    key = {
        "teacher": own | {"weights": f"sha256:{weights_digest}" if teacher.weights else ""},
        "streams": streams_name(recipe, k, fold),
        "seed": recipe.seed,
        "dtype": recipe.compute_dtype,
        "dataset": {
            "name": data.name,
            "path": source,
            "val_fraction": data.val_fraction,
            "data_aug": data.data_aug,
            "batch_size": data.batch_size,
            "small_input": data.small_input,
            **({"image_size": data.image_size} if data.image_size else {}),  # a later key
        },
        "schedule": schedule,
        "grad_clip_norm": recipe.grad_clip_norm,
        "recipe": _RECIPE,
    }
    if teacher.weights and data.name in OTHER_ORDER:
        key["classifier"] = "drawn at random"  # once it was the weights' own, in their order
    if fold is not None:
        key["fold"] = {"of": recipe.folds, "without": fold + 1}
    elif recipe.teacher_holdout:
        key["holdout"] = recipe.teacher_holdout
    key = json.loads(json.dumps(key))  # as it will be read back
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{teacher.name}_{data.name}_seed{recipe.seed}_{digest}"
    return Place(pathlib.Path(recipe.results_dir) / TEACHERS / name, key)


def find(recipe: Recipe, k: int, fold: int | None = None) -> Place | None:
    """The place of teacher `k` (from 0) as far as it can be told without a download.

    Where its given weights are not here it is that of the one kept teacher made from weights of the same reference, and
    alike otherwise; None if there is not exactly one. Where a SHA-256 is given, that of weights that had it.
    """
    given, sha256 = recipe.teachers[k].weights, recipe.teachers[k].weights_sha256.lower()
    path = origins.cached(given) if given else None
    if path or not given:
        return place(recipe, k, origins.digest(path) if path else "", fold)
    alike = []
    for folder in (pathlib.Path(recipe.results_dir) / TEACHERS).glob("[!.]*"):
        about = _about(folder)
        if about is not None and about["reference"] == given:
            digest = about["key"]["teacher"]["weights"].removeprefix("sha256:")
            candidate = place(recipe, k, digest, fold)
            alike += [candidate] if candidate == Place(folder, about["key"]) and sha256 in ("", digest) else []
    return alike[0] if len(alike) == 1 else None


def moved(place: Place, digest: str) -> Place:
    """`place`, or where it holds no teacher, that of one beside it whose variables have this SHA-256: a data set or
    weights of another path are another key.
    """
    if place.folder.exists():
        return place
    for folder in place.folder.parent.glob("[!.]*"):
        about = _about(folder)
        if about is not None and checkpoint.digest(folder / "checkpoint") == digest:
            return Place(folder, about["key"])
    return place


def load(place: Place, train: Split) -> dict[str, Any] | None:
    """The variables kept at `place`; None if there is no such teacher.

    Raises UserError if it was trained on other images than `train`, the folder is damaged, or only some hosts see it.
    """
    exists = place.folder.exists()
    hosts.same_everywhere({f"the presence of {place.folder} (results_dir has to be one folder for all hosts)": exists})
    if not exists:
        return None
    checkpoint.check_readable(place.folder)  # or it would count as damaged
    about = _about(place.folder)
    if about is None:
        raise UserError(f"{place.folder} is not whole: move it away, and the teacher is trained again")
    if about["images"] != images_digest(train):
        raise UserError(
            f"the teacher in {place.folder} was trained on other images of the same dataset.name: use "
            "another results_dir, or move that folder away"
        )
    return checkpoint.restore(place.folder / "checkpoint")


@contextlib.contextmanager
def _writing(store: pathlib.Path) -> Iterator[None]:
    """Within it no other process takes what this one writes for half a teacher that a dead one left; those go."""
    store.mkdir(parents=True, exist_ok=True)
    with open(store.with_name(f".{store.name}.lock"), "w") as lock:
        with contextlib.suppress(BlockingIOError):  # somebody is writing
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in store.glob(".*.*"):
                if not is_whole(left):
                    shutil.rmtree(left, ignore_errors=True)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def save(place: Place, reference: str, variables: dict[str, Any], train: Split, measured: dict[str, Any]) -> bool:
    """Keep a trained teacher; its folder appears complete or not at all. Whether it is what lies there now.

    reference: the `weights` it was given, as the configuration names them. A run that trained the same teacher at the
    same time may have been first: then that one stays, which on GPUs can differ in its last bits. Raises OSError naming
    where the teacher lies if it cannot be moved to its place. Of several hosts the first keeps it, and they can go on
    with no other: then raises UserError.
    """
    if not hosts.is_first():
        return True
    backbone = {name: leaves for name, leaves in variables["params"].items() if name != "distill_adapter"}
    text = json.dumps(
        {"key": place.key, "reference": reference, "images": images_digest(train), "measured": measured}, indent=2
    )
    with _writing(place.folder.parent):
        part = pathlib.Path(tempfile.mkdtemp(prefix=f".{place.folder.name}.", dir=place.folder.parent))
        try:
            checkpoint.save(part / "checkpoint", {"params": backbone, "batch_stats": variables["batch_stats"]})
            (part / "key.json").write_text(text, encoding="utf-8")
            part.chmod(0o755)  # mkdtemp's are for their owner alone
        except OSError:
            shutil.rmtree(part)
            raise
        return _placed(part, place)


def _placed(part: pathlib.Path, place: Place) -> bool:
    """Whether the teacher in the folder `part` is what lies at `place` now."""
    try:
        part.rename(place.folder)
    except OSError as error:
        if _about(place.folder) is None:
            raise OSError(f"the trained teacher lies in {part}: it could not be moved to {place.folder}") from error
        ours, theirs = (checkpoint.digest(folder / "checkpoint") for folder in (part, place.folder))
        shutil.rmtree(part)
        if ours != theirs and jax.process_count() > 1:
            raise UserError(
                f"another run has left a teacher in {place.folder} meanwhile, with other values: move it "
                "away and go on with --resume"
            ) from error
        return ours == theirs
    return True


def _about(folder: pathlib.Path) -> dict[str, Any] | None:
    """What key.json says of a kept teacher; None if the folder is not whole."""
    try:
        about = json.loads((folder / "key.json").read_text())
    except (OSError, ValueError):
        return None
    whole = about.keys() >= {"key", "reference", "images"} and (folder / "checkpoint").exists()
    return about if whole else None


def is_whole(folder: pathlib.Path) -> bool:
    """Whether there is a kept teacher, told without reading its arrays."""
    return _about(folder) is not None


def kept_folder(recipe: Recipe, k: int, fold: int | None = None) -> str:
    """Where an earlier run left teacher `k` (from 0) ready; "": nowhere, or it cannot be told before a download."""
    place = find(recipe, k, fold) if recipe.teachers[k].epochs else None
    return str(place.folder) if place and is_whole(place.folder) else ""
