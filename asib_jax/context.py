"""What all phases of a run share, made before the first of them."""

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Sequence

from tqdm import tqdm

from asib_jax import streams
from asib_jax.data.parts import Data
from asib_jax.engine import views
from asib_jax.engine.banks import Bank, View
from asib_jax.engine.compiled import Steps
from asib_jax.engine.evaluate import Evaluator
from asib_jax.engine.feed import Examples, Feed, tree_bytes
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.recipe import Recipe
from asib_jax.record.experiment import Record
from asib_jax.record.remaining import Remaining
from asib_jax.record.reporting import Reporter
from asib_jax.record.snapshots import Snapshots

logger = logging.getLogger("asib_jax")

_QUIET = 2.0  # seconds between two epochs on the console


@dataclasses.dataclass
class Context:
    """A run's recipe, data, networks and devices; its record, curves and snapshots; banks, compiled steps, evaluators.

    bank: of the training images that the student sees; steps: compiled, by what they train; remaining: what is to be
    done yet.
    """

    recipe: Recipe
    data: Data
    nets: Networks
    feed: Feed
    record: Record
    reporter: Reporter
    snapshots: Snapshots
    steps: dict[Hashable, Steps] = dataclasses.field(default_factory=dict)
    remaining: Remaining = dataclasses.field(default_factory=Remaining)
    _placed: dict[str, tuple[Examples, Examples]] = dataclasses.field(default_factory=dict, init=False)
    _stored: frozenset[View] = dataclasses.field(default=frozenset(), init=False)
    _told: float = dataclasses.field(default=float("-inf"), init=False)  # when an epoch was, last

    def __post_init__(self):
        recipe = self.recipe
        self.bank = Bank(
            self.nets,
            self.data.train,
            self.feed,
            name="the training images",
            key=lambda view: streams.key(recipe.seed, "augment", *view),
            data_aug=recipe.dataset.data_aug,
            place=self.feed.place,
            cache=recipe.teacher_cache,
            narrow=True,
            copy=self.data.copy_to_ask,
        )
        self.validation = self.evaluator("validation")

    def evaluator(self, split: str) -> Evaluator:
        """Of an evaluation split, which has yet to read the teachers."""
        cache = "" if self.recipe.trains_teachers else self.recipe.teacher_cache
        return Evaluator(self.nets, getattr(self.data, split), self.feed, split, cache)

    def compiled(self, key: Hashable, make_step: Callable[[], Callable], *, trains_convolutions: bool) -> Steps:
        """The compiled training step under `key`, made and compiled once in a run."""
        if key not in self.steps:
            logger.info("its training step is compiled with its first call")
            self.steps[key] = self.feed.compile(make_step(), trains_convolutions=trains_convolutions, donate_carry=True)
        return self.steps[key]

    def examples(self, split: str) -> tuple[Examples, Examples]:
        """The images of a split, and their labels and indices; of one split at a time."""
        if split not in self._placed:
            self._placed.clear()
            part = getattr(self.data, split)
            images = self.feed.place(image=part.image)
            logger.info(
                "training images: %s",
                "on the devices"
                if images.resident
                else "on the host, sent ahead of "
                f"each call: more than the room of device_data_gb={self.feed.room_gb:g}",
            )
            self._placed[split] = images, self.feed.place(label=part.label, index=part.index)
        return self._placed[split]

    def read_teachers(self, variables: Variables, phases: Sequence[views.Reads]) -> None:
        """Run the teachers, once they are ready, over the views that the phases read and that fit."""
        self._placed.pop("teacher_train", None)  # the teachers have learnt: their room is for the views
        stored = views.choose(phases, self.nets, len(self.data.train.label), tree_bytes(self.data.train), self.feed)
        for line in stored.lines:
            logger.info("%s", line)
        self._stored = stored.views
        if self._stored:
            self.bank.read("teachers", variables, sorted(self._stored))

    def read_student(self, variables: Variables, read: Sequence[View]) -> None:
        """Run the student, while it stands still, over validation and the stored views among those that are read."""
        self.validation.bank.read("student", variables)
        if wanted := sorted(self._stored.intersection(read)):
            self.bank.read("student", variables, wanted)

    def forget_student(self) -> None:
        """Free what `read_student` has stored: it goes on training."""
        self.validation.bank.forget("student")
        self.bank.forget("student")

    def bar(self, images: int, title: str) -> tqdm:
        """A progress bar over an epoch of so many images."""
        batch = self.recipe.dataset.batch_size
        return self.reporter.epoch_bar(images // batch * batch, title)

    def log(self, key: str, values: dict[str, float]) -> None:
        """Record scalars under `key`/name."""
        for name, value in values.items():
            self.record.log(f"{key}/{name}", value)

    def log_epoch(self, key: str, values: dict[str, float], seconds: float, curve: str, number: int) -> None:
        """Record an epoch's scalars under `key`, its duration under `time/`; draw them as epoch `number` of a curve."""
        self.log(key, values)
        self.record.log(f"time/{key}/seconds", seconds)
        self.record.save()
        self.reporter.scalars({f"{curve}/{name}": value for name, value in values.items()}, number)

    def tell_epoch(self, key: str, values: dict[str, float], seconds: float, last: bool) -> None:
        """A line of log.txt, on the console only every few seconds, and where it is the `last` one or must be seen."""
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        quiet = not last and time.monotonic() - self._told < _QUIET
        self._told = self._told if quiet else time.monotonic()
        level = logging.DEBUG if quiet else logging.INFO
        logger.log(level, "%s  %s  %.1f s  %s", key, "  ".join(shown), seconds, self.remaining.text())
