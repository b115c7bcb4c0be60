"""The groups of keys within a configuration: the data, the student, a teacher, the schedule of learning rates."""

import dataclasses

from asib_jax.data.augment import POLICIES
from asib_jax.data.sources import SOURCES
from asib_jax.objectives.schedules import SCHEDULES
from asib_jax.recipe.conditions import FINETUNED, FROM_SCRATCH, GIVEN, STUDENT, TRAINED_FIRST, TRAINED_IN_A
from asib_jax.recipe.keys import When, key
from asib_jax.recipe.ranges import DECAY, MEAN, MIXING, RATE, STD, TEMPERATURE


@dataclasses.dataclass(frozen=True)
class DatasetRecipe:
    name: str = key(
        "",
        "where images come from; empty: what `dataset.path` holds, told by its files, or without a path cifar100",
        choices=("", *SOURCES),
    )
    path: str = key("", "a file or folder of one's own; empty: look in `data_dir`, else download", free=True)
    data_dir: str = key(
        "", "where tfds and downloads live; empty: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`", free=True
    )
    image_size: int = key(
        0,
        "0: images as they are, all of one size; n: resized to n x n, of the longer side the middle",
        at_least=0,
        at_most=4096,
    )
    batch_size: int = key(64, "images of a training step, over all devices of all hosts", above=0)
    eval_batch_size: int = key(
        0,
        "images of a step of evaluation and of reading frozen networks; 0: sized to the device",
        at_least=0,
        free=True,
    )
    data_aug: int = key(1, "0 none, 1 crop and flip, 2 strong, 3 crop alone", choices=tuple(POLICIES))
    small_input: bool = key(
        True, "3x3 stride-1 stem without pooling, for images of some 32x32 pixels, of every network"
    )
    val_fraction: float = key(
        0.1,
        "share of the training split set aside, stratified; every choice is made on it, never on test",
        above=0,
        below=1,
    )
    train_subset: int = key(
        0,
        "training images the student sees, stratified; 0: all; teachers trained here see all",
        at_least=0,
        when=STUDENT,
    )


@dataclasses.dataclass(frozen=True)
class StudentRecipe:
    name: str = key("resnet101_scratch", "a network of models.md; `_pretrain` expects `weights`, `_scratch` none")
    weights: str = key("", "as `teacherK.weights`; empty: trained from scratch")
    weights_sha256: str = key("", "of that file, in hexadecimal: any other is refused; empty: not compared")
    mean: tuple[float, ...] = key(
        (),
        "mean of pixels in [0, 1] that the weights expect; one value serves all channels; empty: of the training "
        "images without validation",
        **MEAN,
        of_data=True,
    )
    std: tuple[float, ...] = key((), "standard deviation, likewise", **STD, of_data=True)
    saw_val: bool = key(
        True, "as `teacherK.saw_val`", when=When("`weights`", lambda recipe: bool(recipe.model.student.weights))
    )
    use_adapter: bool = key(
        False, "residual 1x1-convolution adapter after the last-but-one stage, at first the identity"
    )

    @property
    def saw_validation(self) -> bool:
        """Whether it began with weights that were fitted on the validation images."""
        return bool(self.weights) and self.saw_val


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    student: StudentRecipe = key(StudentRecipe(), "the network that is distilled into")


@dataclasses.dataclass(frozen=True)
class TeacherRecipe:
    name: str = key("resnet152", "a network of models.md")
    weights: str = key(
        "",
        "`hf:OWNER/REPO[@REVISION][/FILE]`, a .safetensors, .npz or .pth file, or a checkpoint of "
        "our own, see models.md; empty: trained from scratch",
    )
    weights_sha256: str = key("", "of that file, in hexadecimal: any other is refused; empty: not compared", when=GIVEN)
    mean: tuple[float, ...] = key(
        (),
        "mean of pixels in [0, 1] that the weights expect; one value serves all channels; empty: of the training "
        "images without validation",
        **MEAN,
        of_data=True,
    )
    std: tuple[float, ...] = key((), "standard deviation, likewise", **STD, of_data=True)
    classes: str = key(
        "",
        "the classes that it knows, as label numbers, e.g. `0-59,70`, or names, in the order of its classifier's "
        "outputs; it is trained on their images alone; empty: all, or what `specialists.overlap` says",
        of_data=True,
    )
    saw_val: bool = key(
        True,
        "the weights were fitted on our validation images too: the final table marks what that inflates",
        when=GIVEN,
    )
    temperature: float = key(
        1.0,
        "divides its logits before anything uses them as a target; `tau` comes on top; 0: the one at which its mean "
        "entropy on training images is that on validation",
        at_least=0,
        at_most=TEMPERATURE["at_most"],
    )
    train_epochs: int = key(
        0,
        "supervised training from scratch, without the validation images; the best epoch on validation counts",
        at_least=0,
    )
    train_lr: float = key(1e-3, "learning rate from scratch, under the run's `schedule`", **RATE, when=FROM_SCRATCH)
    train_weight_decay: float = key(3e-4, "weight decay from scratch", **DECAY, when=FROM_SCRATCH)
    finetune_epochs: int = key(0, "the same from `weights`; 0: they are used as they are", at_least=0)
    finetune_lr: float = key(1e-4, "learning rate of fine-tuning, under the run's `schedule`", **RATE, when=FINETUNED)
    finetune_weight_decay: float = key(0.05, "weight decay of fine-tuning", **DECAY, when=FINETUNED)
    finetune_freeze_level: int = key(-1, "as `student_freeze_level`, while fine-tuning", when=FINETUNED)
    warmup_epochs: int = key(
        1, "of the learning rate; this and the next five keys: of either training", at_least=0, when=TRAINED_FIRST
    )
    label_smoothing: float = key(0.0, "of the cross entropy", at_least=0, below=1, when=TRAINED_FIRST)
    finetune_use_cutmix: bool = key(False, "cutmix on every batch", when=TRAINED_FIRST)
    finetune_cutmix_alpha: float = key(
        1.0,
        "of its Beta(alpha, alpha)",
        above=0,
        at_most=MIXING["at_most"],
        when=TRAINED_FIRST & When("`finetune_use_cutmix`", lambda teacher, recipe: teacher.finetune_use_cutmix),
    )
    early_stopping_patience: int = key(
        0,
        "epochs without a better validation accuracy after which training ends; 0: never",
        at_least=0,
        when=TRAINED_FIRST,
    )
    early_stopping_min_delta: float = key(
        0.0,
        "by how much it must be better, as a share of 1",
        at_least=0,
        at_most=1,
        when=TRAINED_FIRST
        & When("`early_stopping_patience`", lambda teacher, recipe: teacher.early_stopping_patience > 0),
    )
    freeze_level: tuple[int, ...] = key(
        (-1,),
        "as `student_freeze_level`, in A-Steps",
        when=TRAINED_IN_A & When("`use_partial_freeze`", lambda teacher, recipe: recipe.use_partial_freeze),
    )
    freeze_bn: bool = key(True, "as `student_freeze_bn`, in A-Steps", when=TRAINED_IN_A)

    @property
    def epochs(self) -> int:
        """Of supervised training here: fine-tuning of given weights, or from scratch; 0: ready as it is."""
        return self.finetune_epochs if self.weights else self.train_epochs

    @property
    def saw_validation(self) -> bool:
        """Whether it began with weights that were fitted on the validation images."""
        return bool(self.weights) and self.saw_val

    @property
    def lr(self) -> float:
        return self.finetune_lr if self.weights else self.train_lr

    @property
    def weight_decay(self) -> float:
        return self.finetune_weight_decay if self.weights else self.train_weight_decay


@dataclasses.dataclass(frozen=True)
class SpecialistsRecipe:
    overlap: float | None = key(
        None,
        "empty: teachers know all classes; else these are divided among the teachers into ranges of one width, "
        "of which neighbours share this percentage of all: of 10 and 2 teachers 20 makes 0-5 and 4-9",
        at_least=0,
        at_most=100,
        when=When(
            "two teachers, no `teacherK.classes`",
            lambda recipe: len(recipe.teachers) > 1 and not any(teacher.classes for teacher in recipe.teachers),
        ),
    )


_COSINE, _STEP, _MULTISTEP = (
    When(f"`schedule.type='{kind}'`", lambda recipe, kind=kind: recipe.schedule.type == kind)
    for kind in ("cosine", "step", "multistep")
)


@dataclasses.dataclass(frozen=True)
class ScheduleRecipe:
    type: str = key(
        "cosine", "how learning rates go, over all epochs that an optimizer sees in the run", choices=SCHEDULES
    )
    lr_warmup_epochs: int = key(
        5, "first epochs, in which they rise linearly; teachers have their own", at_least=0, when=STUDENT
    )
    min_lr: float = key(1e-5, "learning rate at the end", at_least=0, at_most=RATE["at_most"], when=_COSINE)
    step_size: int = key(10, "epochs between two steps of it", at_least=1, when=_STEP)
    gamma: float = key(
        0.1,
        "factor of the learning rate at a step or milestone",
        above=0,
        at_most=1,
        when=When("another `schedule.type`", lambda recipe: recipe.schedule.type != "cosine"),
    )
    milestones: tuple[int, ...] = key(
        (), "epochs at which it is multiplied by `gamma`, in rising order", at_least=1, when=_MULTISTEP
    )
