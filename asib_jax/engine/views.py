"""Which views of the training images frozen networks read once, within the room there is, and what that saves."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from asib_jax.engine.banks import View
from asib_jax.engine.feed import GIB, Feed
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks


class Reads(Protocol):
    """What training asks of a bank.

    reads: whose outputs its steps can take from there, of "teachers" and "student". views: of each of its epochs.
    runs_networks: why it runs the networks at every step instead, in a line; "": it does not, or it has none.
    """

    @property
    def reads(self) -> frozenset[str]: ...
    @property
    def views(self) -> tuple[View, ...]: ...
    @property
    def runs_networks(self) -> str: ...


class Stored(NamedTuple):
    """The views whose outputs are stored, and what that means, in lines for a person."""

    views: frozenset[View]
    lines: tuple[str, ...]


def choose(phases: Sequence[Reads], nets: Networks, images: int, image_bytes: int, feed: Feed) -> Stored:
    """As many views as fit beside the training images, those of most epochs first.

    images: of the training split; image_bytes: in all. Raises UserError where teachers have copies and not all fit.
    """
    room = feed.room - (image_bytes if image_bytes <= feed.room else 0)
    each = bytes_each(nets)
    epochs = collections.Counter(view for phase in phases if phase.reads for view in phase.views)
    wanted = sorted(epochs, key=lambda view: (-epochs[view], view))
    stored: set[View] = set()
    for view in wanted:
        if images * _bytes(phases, {*stored, view}, each) <= room:
            stored.add(view)
    if nets.folds and len(stored) < len(wanted):
        needed = images * _bytes(phases, wanted, each)
        lacks, count = (needed - room) / GIB, len(feed.devices)
        raise UserError(
            f"teacher_folds={nets.folds} needs the teachers' outputs on all {len(wanted)} views stored, "
            f"{needed / GIB:.3g} GiB, {lacks:.3g} more than device_data_gb={feed.room_gb:g} leaves on {count} "
            f"device(s) beside the images: set --config.device_data_gb={feed.room_gb + 1.05 * lacks / count:.3g}, "
            "fewer a_step_views or b_step_views, or dataset.train_subset"
        )
    lines = list(dict.fromkeys(phase.runs_networks for phase in phases if phase.runs_networks))
    if len(stored) < len(wanted):
        lines.insert(
            0,
            f"{len(wanted) - len(stored)} of {len(wanted)} views are not stored, in their epochs the networks "
            f"run at every step: all would take {images * _bytes(phases, wanted, each) / GIB:.3g} GiB, "
            f"device_data_gb={feed.room_gb:g} leaves {room / GIB:.3g} on {len(feed.devices)} device(s)",
        )
    if stored:
        students = any("student" in phase.reads for phase in phases)
        read = sum(epochs[view] for view in stored)
        lines.insert(
            0,
            f"stored: the teachers' outputs on {len(stored)} view(s) of {images:,} training images"
            f"{', and the student' + chr(39) + 's for each A-Step' if students else ''}, "
            f"{images * _bytes(phases, stored, each) / GIB:.3g} GiB; teachers read "
            f"{len(stored) * images:,} images instead of {read * images:,}",
        )
    return Stored(frozenset(stored), tuple(lines))


def bytes_each(nets: Networks) -> Mapping[str, int]:
    """Bytes of what "teachers" and "student" say of one image, features and logits in as many bits as they compute."""

    def of(*models):
        return sum(
            jnp.dtype(model.dtype).itemsize * (model.architecture.feat_dim + model.num_classes) for model in models
        )

    return {"teachers": of(*nets.teachers), "student": of(nets.student)}


def _bytes(phases: Sequence[Reads], views: Iterable[View], each: Mapping[str, int]) -> int:
    """Of one image: the teachers' on all views, the student's on those of one phase at a time."""
    views = set(views)
    students = max((len(views & set(phase.views)) for phase in phases if "student" in phase.reads), default=0)
    return len(views) * each["teachers"] + students * each["student"]
