"""Banks: what frozen networks say of a split, read once for each view of it and served as data.

Outputs are those before any adapter, so that adapters may go on training. Training and evaluation splits have banks
alike; an evaluation split has one view, its images as they are.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax.data.augment import augment
from asib_jax.data.sources import Split
from asib_jax.data.splits import evaluation_rows
from asib_jax.engine import bank_files, devices, hosts
from asib_jax.engine.compiled import Steps
from asib_jax.engine.feed import Examples, Feed, on_host
from asib_jax.models.ensemble import (
    Networks,
    StudentOutputs,
    TeacherOutputs,
    Variables,
    of_copies,
    run_student,
    run_teachers,
    with_narrow_teachers,
)

logger = logging.getLogger("asib_jax")

_QUIET = 10.0  # seconds between two lines about views that are read

View = tuple[int, int]  # the stage and the epoch whose augmentation it is
PLAIN: View = (-1, -1)  # images as they are
Outputs = TeacherOutputs | StudentOutputs  # of one view of a split: numpy leaves [N, ...], rows as in the split


class Bank:
    """The outputs of the teachers and of the student on views of one split, as long as they stand still.

    name: of the split, in words. key: of a view's augmentation by the policy `data_aug`. place: where examples wait.
    cache: a folder that keeps the teachers' outputs between runs; "": none. narrow: of networks that compute in 16 bits
    logits are held in 16 bits, too: in float16, whose rounding moves a target eight times less than bfloat16's.
    copy: which copy of the teachers is asked of each image, [N], where they have several (SPEC 13). every_copy: all are
    asked of every image, as evaluation does it, and the outputs are a tuple, of each copy one.
    """

    def __init__(
        self,
        nets: Networks,
        split: Split,
        feed: Feed,
        *,
        name: str,
        key: Callable[[View], jax.Array] = lambda view: jax.random.key(0),
        data_aug: int = 0,
        place: Callable[..., Examples] = on_host,
        cache: str = "",
        narrow: bool = False,
        copy: np.ndarray | None = None,
        every_copy: bool = False,
    ):
        self.nets, self.split, self.name = nets, split, name
        self._feed, self._key, self._data_aug, self._place, self._cache = feed, key, data_aug, place, cache
        self._narrow = narrow and jnp.dtype(nets.student.dtype).itemsize == 2
        self._copy, self._every_copy = copy, every_copy
        self._held: dict[tuple[str, View], Examples] = {}

    def read(self, who: str, variables: Variables, views: Sequence[View] = (PLAIN,)) -> list[Any]:
        """Run "teachers" or "student" over the views and keep what they say, in the place of what is held of them.

        Returns the outputs, TeacherOutputs (with `every_copy` a tuple of them) or StudentOutputs of each view. Raises
        UserError for a file of the cache that cannot be read.
        """
        self.forget(who)
        keys = [self._key(view) for view in views]
        if who == "student":
            outputs = list(self._run(who, variables.only(("student",)), keys, None))
        else:
            outputs = self._read_teachers(variables, keys)
        held = _narrowed(outputs) if self._narrow else outputs
        self._held |= {(who, view): self._place(**{who: found}) for view, found in zip(views, held, strict=True)}
        return outputs

    def forget(self, who: str) -> None:
        """Free what `read` has kept: the networks go on training."""
        self._held = {place: examples for place, examples in self._held.items() if place[0] != who}

    def of(self, who: str, view: View = PLAIN) -> Examples | None:
        """What is held; None: nothing, the network is to be run."""
        return self._held.get((who, view))

    def _read_teachers(self, variables: Variables, keys: list[jax.Array]) -> list[Any]:
        """What every copy says of all rows, or, put together, each of the rows that are its own."""
        copies = of_copies(self.nets, variables, deployed=self._every_copy)
        several = len(copies) > 1 and not self._every_copy
        if several and self._copy is None:
            raise ValueError(f"which of {len(copies)} copies of the teachers is asked of which of {self.name}?")
        parts = [np.flatnonzero(self._copy == number) if several else None for number in range(len(copies))]
        asked = [(copy, rows) for copy, rows in zip(copies, parts) if rows is None or len(rows)]
        read = self._cached if self._cache else functools.partial(self._run, "teachers")
        found = zip(*(list(read(copy, keys, rows)) for copy, rows in asked), strict=True)  # by view
        if self._every_copy:
            return list(found)
        return [_by_row(outputs, [rows for _, rows in asked]) if several else outputs[0] for outputs in found]

    def _cached(self, teachers: Variables, keys: list[jax.Array], rows: np.ndarray | None) -> list[TeacherOutputs]:
        """From the cache where all hosts see a file there; the first host stores what is computed."""
        paths = bank_files.paths(self._cache, self.nets, teachers, self.split, self._data_aug, keys, rows)
        stored = hosts.everywhere([path.exists() for path in paths])
        views = [bank_files.load(path, self.nets) if there else None for path, there in zip(paths, stored, strict=True)]
        missing = [place for place, view in enumerate(views) if view is None]
        if len(missing) < len(keys):
            logger.info(
                "teachers on %s: %d of %d view(s) read from %s",
                self.name,
                len(keys) - len(missing),
                len(keys),
                self._cache,
            )
        for place, view in zip(
            missing, self._run("teachers", teachers, [keys[place] for place in missing], rows), strict=True
        ):
            views[place] = view
            if hosts.is_first():
                bank_files.store(paths[place], self.nets, view)
        return views

    def _run(self, who: str, variables: Variables, keys: list[jax.Array], chosen: np.ndarray | None) -> Iterator[Any]:
        """What the networks say of the chosen rows (None: of all) under each augmentation key."""
        size = len(self.split.label)
        count = size if chosen is None else len(chosen)
        if who == "teachers" and keys:
            logger.info("teachers on %s: %d images, %d view(s)", self.name, count, len(keys))
        step = _reader(self.nets, who, self._data_aug, self._feed)
        if who == "teachers":
            variables = with_narrow_teachers(self.nets, variables)
        variables = devices.share(variables, self._feed.devices)
        images = on_host(image=self.split.image, index=self.split.index)  # one shape and one program for all splits
        rows = evaluation_rows(count, self._feed.eval_batch_size)
        if chosen is not None:
            rows = np.append(chosen, size)[np.minimum(rows, count)]  # the last stands for no example
        told = time.monotonic()
        for place, key in enumerate(keys):
            if time.monotonic() - told > _QUIET:
                told = time.monotonic()
                logger.info("%s on %s: view %d of %d", who, self.name, place + 1, len(keys))
            found: list[Outputs] = []
            pending: list[Outputs] = []
            for call in self._feed.calls(step, rows, images):
                found += jax.device_get(pending)  # of the call before, while this one's images were on their way
                pending = [step.run((), variables, {"augment_key": key}, call, {})[1]]
            found += jax.device_get(pending)
            yield jax.tree.map(
                lambda *leaves: np.concatenate([leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves])[:count], *found
            )


def _by_row(outputs: Sequence[Outputs], parts: Sequence[np.ndarray]) -> Outputs:
    """The outputs of each copy on its own part of the rows, in the order of the rows."""
    order = np.argsort(np.concatenate(parts))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *outputs)


def _narrowed(outputs: list[Outputs]) -> list[Outputs]:
    return jax.tree.map(lambda leaf: leaf.astype(np.float16) if leaf.dtype == np.float32 else leaf, outputs)


@functools.lru_cache(maxsize=8)  # one compilation for all the splits of a run
def _reader(nets: Networks, who: str, data_aug: int, feed: Feed) -> Steps:
    return feed.compile(make_reader(nets, who, data_aug, feed.axis_name))


def make_reader(nets: Networks, who: str, data_aug: int, axis_name: str | None = None) -> Callable:
    """`step((), variables, controls, batch) -> ((), outputs)`: what "teachers" or "student" say of a batch's images.

    controls: augment_key.
    """

    def read(nothing, variables, controls, batch):
        pixels = augment(controls["augment_key"], batch["index"], batch["image"], data_aug)
        outputs = run_student(nets, variables, pixels) if who == "student" else run_teachers(nets, variables, pixels)[0]
        return nothing, outputs if axis_name is None else jax.lax.all_gather(outputs, axis_name, tiled=True)

    return read
