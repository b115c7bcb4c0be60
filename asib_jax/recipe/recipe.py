"""A run's configuration as one frozen dataclass: the table of all keys, and what follows from their values.

Each field says of its key all there is to say (`keys.py`); what relates several keys is checked in `checks.py`.
"""

import dataclasses

from asib_jax.models.ib_mbm import BASES, FEATURE_NORMS, KEYS
from asib_jax.objectives.losses import DISAGREE_MODES
from asib_jax.objectives.targets import KD_TARGETS
from asib_jax.recipe.conditions import (
    ADAPTERS,
    BOTTLENECK,
    CCCP,
    DISAGREEMENT,
    FOLDS,
    FUSION,
    HOLDOUT,
    IB_BETA,
    KD,
    LAMBDAS_DIFFER,
    STUDENT,
    SYNERGY,
    TEACHERS,
    TUNED,
)
from asib_jax.recipe.groups import DatasetRecipe, ModelRecipe, ScheduleRecipe, StudentRecipe, TeacherRecipe
from asib_jax.recipe.keys import When, key
from asib_jax.recipe.ranges import DECAY, MIXING, RATE, TEMPERATURE, WEIGHT
from asib_jax.recipe.run import RunRecipe


@dataclasses.dataclass(frozen=True)
class Recipe(RunRecipe):
    """Everything a run needs to know. `teachers` gathers the groups teacher1, teacher2, ... in order."""

    # fmt: off
    # data and networks
    dataset: DatasetRecipe = key(DatasetRecipe(), "the images")
    model: ModelRecipe = key(ModelRecipe(), "what is distilled into", when=STUDENT)
    teachers: tuple[TeacherRecipe, ...] = key((TeacherRecipe(name="convnext_l"), TeacherRecipe(name="resnet152")),
                                              "what is distilled from", when=TEACHERS)
    teacher_folds: int = key(0, "K: every teacher is trained or fine-tuned K times, each time without one of K "
                             "stratified folds of its images; A- and B-Step ask of an image the copy that did not see "
                             "it (models.md); 0: once, on all", at_least=0, at_most=100, when=TEACHERS)
    teacher_holdout: float = key(0.0, "share of their images, stratified, that teachers are trained without",
                                 at_least=0, below=1, when=When("teachers or `student_images='holdout'`", lambda recipe:
                                                    recipe.uses_teachers or recipe.student_images == "holdout"))
    teacher_deploy: str = key("copies", "under `teacher_folds` what is asked on validation and test: the mean of "
                              "the copies' log-probabilities, or one more teacher, trained on all images",
                              choices=("copies", "all"), when=FOLDS)
    student_images: str = key("all", "what A- and B-Step train on: all images, or those that teachers are trained "
                              "without", choices=("all", "holdout"), when=STUDENT & HOLDOUT)
    a_step_views: int = key(4, "V > 0: the A-Step sees V fixed augmented views of every training image, which frozen "
                            "networks read once: much faster, less varied; 0: a new view every epoch", at_least=0,
                            when=FUSION)
    b_step_views: int = key(0, "the same of the B-Step, where the student sees them, too; with mixup, cutmix or "
                            "teachers in training, teachers read them at every step", at_least=0, when=STUDENT)
    teacher_cache: str = key("", "a folder that keeps what frozen teachers say of images between runs, under a digest "
                             "of weights, images and views; of several hosts the first writes; empty: none",
                             free=True, when=TEACHERS & When(
                                 "no `use_teacher_finetuning`", lambda recipe: not recipe.trains_teachers))
    allow_teachers_at_chance: bool = key(False, "use given weights as a teacher that is not above chance on "
                                         "validation, which else is an error", when=TEACHERS, free=True)
    teachers_only: bool = key(False, "make the teachers ready, measure them and stop")
    # distillation
    kd_target: str = key("synergy", "whose output is distilled: the fusion network's, one teacher's, or the teachers' "
                         "by weights of some kind", choices=("synergy", *KD_TARGETS), when=STUDENT & KD)
    kd_teacher_index: int = key(0, "which teacher, from 0", at_least=0, when=STUDENT & When(
        "`kd_target='teacher'`", lambda recipe: recipe.kd_target == "teacher"))
    ce_alpha: float = key(0.65, "weight of the labels; scaled with `kd_alpha` to sum 1 where both are positive",
                          **WEIGHT, when=STUDENT)
    kd_alpha: float = key(0.35, "weight of distillation", **WEIGHT, when=STUDENT)
    kd_max_ratio: float = key(2.0, "after the ramp KD counts as at most this many times the cross entropy, both before "
                              "their weights; 0: no bound", **WEIGHT, when=STUDENT & KD)
    kd_warmup_epochs: int = key(0, "linear ramp of the KD weight, in the first stage only", at_least=0,
                                when=STUDENT & KD)
    kd_ens_alpha: float = key(
        0.0, "share of the teachers' average in the synergy target, at first", at_least=0, at_most=1,
        when=STUDENT & SYNERGY & When("`teacher_adapt_kd_warmup`", lambda recipe: recipe.teacher_adapt_kd_warmup > 0))
    teacher_adapt_kd_warmup: int = key(
        0, "first epochs of every B-Step, in which there is that share", at_least=0,
        when=STUDENT & SYNERGY & When("`kd_ens_alpha`", lambda recipe: recipe.kd_ens_alpha > 0))
    kd_student_share: float = key(0.0, "share of the student's own log-probabilities in every target, without gradient",
                                  at_least=0, below=1, when=STUDENT & KD)
    kd_student_share_end: float | None = key(
        None, "that share in the last B-epoch of the run, linear from `kd_student_share` in the first; empty: constant",
        at_least=0, below=1, when=STUDENT & KD & When(
            "more than one B-epoch", lambda recipe: sum(recipe.b_epochs) > 1))
    tau: float = key(4.0, "distillation temperature, and that of CCCP", **TEMPERATURE, when=STUDENT & TEACHERS & When(
        "`use_cccp` if `tau_schedule`", lambda recipe: not recipe.tau_schedule or recipe.use_cccp))
    tau_schedule: tuple[float, ...] = key((2.0, 6.0), "temperature in the first and the last epoch of each step of "
                                          "each stage; beats `tau`", **TEMPERATURE, lengths=(0, 2),
                                          when=STUDENT & TEACHERS)
    tau_decay_power: float = key(1.0, "shape of `tau_schedule`; 1 is linear", above=0, at_most=100, when=STUDENT & When(
        "`tau_schedule`", lambda recipe: bool(recipe.tau_schedule)))
    feat_kd_alpha: float = key(0.0, "weight of the student's distance to mu of the fusion network, by certainty; "
                               "widths must match", **WEIGHT, when=STUDENT)
    feat_kd_key: str = key("", "which of the student's features asks the fusion network and is drawn to it; empty: as "
                           "the teachers are read", choices=("", "distill_feat", "feat_2d"), when=FUSION)
    use_loss_clamp: bool = key(False, "scale the B-Step's loss down to a bound, its gradient's direction kept",
                               when=STUDENT)
    loss_clamp_max: float = key(1000.0, "bound of the B-Step's loss", at_least=1e-6, at_most=1e9, when=STUDENT & When(
        "`use_loss_clamp`", lambda recipe: recipe.use_loss_clamp))
    ce_label_smoothing: float = key(0.0, "of the B-Step's cross entropy", at_least=0, below=1, when=STUDENT)
    mixup_alpha: float = key(0.0, "mixup in the B-Step, Beta(alpha, alpha); both labels count", **MIXING, when=STUDENT)
    cutmix_alpha_distill: float = key(0.0, "cutmix, likewise; both at once is an error", **MIXING, when=STUDENT)
    use_disagree_weight: bool = key(False, "weight the KD term by the teachers' disagreement, to batch mean 1",
                                    when=STUDENT & KD & LAMBDAS_DIFFER)
    disagree_mode: str = key("pred", "teachers disagree where two predict different classes that both know, or where "
                             "of those that know the label all or any are wrong",
                             choices=tuple(DISAGREE_MODES), when=DISAGREEMENT & LAMBDAS_DIFFER)
    disagree_lambda_high: float = key(1.0, "weight where teachers disagree", **WEIGHT, when=DISAGREEMENT)
    disagree_lambda_low: float = key(1.0, "weight elsewhere", **WEIGHT, when=DISAGREEMENT)
    use_partial_freeze: bool = key(False, "act on all freeze levels", when=STUDENT)
    student_freeze_level: tuple[int, ...] = key(
        (-1,), "one level, or one per stage; -1 nothing frozen, 0 head and adapters train, 1 the network's last stage "
        "too, 2 ...", when=STUDENT & When("`use_partial_freeze`", lambda recipe: recipe.use_partial_freeze))
    student_freeze_bn: bool = key(False, "parameters and statistics of normalisation stand still, at every level",
                                  when=STUDENT)
    # fusion
    use_distillation_adapter: bool = key(True, "networks are read through a distillation adapter each", when=FUSION)
    distill_out_dim: int = key(512, "width of the distillation adapters", at_least=1, when=ADAPTERS)
    distill_hidden_dim: int = key(0, "hidden width of the distillation adapters; 0: max(feature width // 2, "
                                  "`distill_out_dim`)", at_least=0, when=ADAPTERS)
    use_ib: bool = key(False, "information bottleneck: a variance layer, and sampling", when=FUSION)
    ib_beta: float = key(5e-5, "weight of the bottleneck's KL term", **WEIGHT, when=IB_BETA)
    ib_beta_warmup_epochs: int = key(8, "linear ramp of `ib_beta`, in the run's A-epochs with the bottleneck "
                                     "active", at_least=0, when=IB_BETA)
    beta_schedule: tuple[float, ...] = key((), "`ib_beta` as (start, end, epochs): linear, then constant",
                                           **WEIGHT, lengths=(0, 3), when=BOTTLENECK)
    ib_mbm_out_dim: int = key(512, "width of the fusion network", at_least=1, when=FUSION)
    ib_mbm_n_head: int = key(4, "attention heads of the fusion network; divides `ib_mbm_out_dim`", at_least=1,
                             when=FUSION)
    ib_mbm_feature_norm: str = key("none", "normalisation of the features that the fusion network reads",
                                   choices=FEATURE_NORMS, when=FUSION)
    ib_mbm_residual: bool = key(True, "add the query to what attention read, followed by LayerNorm", when=FUSION)
    ib_mbm_logvar_clip: float = key(6.0, "bound of the log variance, both ways; the share of clipped entries is "
                                    "logged", above=0, at_most=50,
                                    when=BOTTLENECK)
    ib_mbm_min_std: float = key(1e-3, "smallest standard deviation of the bottleneck", at_least=1e-9, when=BOTTLENECK)
    ib_mbm_reg_lambda: float = key(0.0, "weight of the mean squares of fusion network and head", **WEIGHT,
                                   when=FUSION)
    ib_mbm_kv: str = key("", "what the fusion network reads of a teacher: its feature, or its probabilities beside it; "
                         "empty: feat_prob where a teacher lacks classes, else feat", choices=("", *KEYS), when=FUSION)
    ib_mbm_teacher_dropout: float = key(0.0, "A-Step: probability that an example leaves a teacher out, of keys and "
                                        "base; never all who know a class", at_least=0, below=1, when=FUSION)
    synergy_base: str = key("", "what synergy adds to: nothing, the teachers' average or their learnt mixture; empty: "
                            "mixture where a teacher lacks classes, else avg", choices=("", *BASES), when=FUSION)
    synergy_head_dropout: float = key(0.0, "dropout in the synergy head", at_least=0, below=1, when=FUSION)
    synergy_temp_learnable: bool = key(False, "synergy logits are divided by a learnt temperature", when=FUSION)
    min_cw: float = key(0.1, "certainty weights, relative to the batch mean, are clipped to [min_cw, 1 / min_cw]",
                        above=0, at_most=1, when=BOTTLENECK)
    synergy_only_epochs: int = key(6, "first A-epochs of the run, without bottleneck, certainty and student terms",
                                   at_least=0, when=FUSION)
    enable_kd_after_syn_acc: float | None = key(
        None, "validation accuracy of the synergy ensemble from which it is distilled; below chance it is an error; "
        "empty: 1 / sqrt(classes), e.g. 0.71 for 2, 0.32 for 10, 0.1 for 100", at_least=0, at_most=1, when=FUSION,
        of_data=True)
    synergy_ce_alpha: float = key(0.6, "A-Step: weight of the synergy logits' cross entropy", **WEIGHT, when=FUSION)
    synergy_kd_alpha: float = key(1.0, "A-Step: pulls synergy towards the teachers' average, which keeps it soft; 0 is "
                                  "the original", **WEIGHT, when=FUSION)
    synergy_ema_alpha: float = key(0.8, "weight of a new measurement in the averaged synergy accuracy that decides",
                                   at_least=0, at_most=1, when=FUSION)
    label_smoothing: float = key(0.0, "of the A-Step's cross entropy", at_least=0, below=1, when=FUSION)
    teacher_adapt_alpha_kd: float | None = key(None, "A-Step: pulls synergy towards the student; empty: `kd_alpha`",
                                               **WEIGHT, when=FUSION)
    use_cccp: bool = key(False, "add the CCCP term; multiply epochs", when=STUDENT & When(
        "fusion or `cccp_ns` > 1", lambda recipe: recipe.uses_fusion or recipe.cccp_ns > 1))
    cccp_alpha: float = key(0.25, "weight of the CCCP term", **WEIGHT, when=FUSION & CCCP)
    cccp_nt: int = key(1, "multiplies the A-epochs", at_least=1, when=FUSION & CCCP)
    cccp_ns: int = key(1, "multiplies the B-epochs", at_least=1, when=STUDENT & CCCP)
    train_distill_adapter_only: bool = key(False, "A-Steps also train the teachers' adapters", when=ADAPTERS)
    use_teacher_finetuning: bool = key(False, "A-Steps also train the teachers; both at once is an error", when=FUSION)
    reg_lambda: float = key(0.0, "weight of the mean squares of teacher tensors in training", **WEIGHT, when=TUNED)
    # optimisation
    optimizer: str = key("adamw", "the student's; the A-Step uses AdamW",
                         choices=("adamw", "sgd"), when=STUDENT)
    momentum: float = key(0.9, "Nesterov momentum of sgd", at_least=0, at_most=1, when=STUDENT & When(
        "`optimizer='sgd'`", lambda recipe: recipe.optimizer == "sgd"))
    student_lr: float = key(1e-3, "learning rate of the B-Step", **RATE, when=STUDENT)
    student_weight_decay: float = key(3e-4, "weight decay of the B-Step, on matrices only", **DECAY, when=STUDENT)
    grad_clip_norm: float = key(0.5, "bound of the global gradient norm, in every optimizer; 0: off", at_least=0,
                                at_most=1e9)
    a_step_lr: float = key(1e-4, "learning rate of adapters in the A-Step", **RATE, when=FUSION)
    ib_mbm_lr_factor: float = key(10.0, "learning rate of fusion network and head, in multiples of `a_step_lr`",
                                  at_least=1e-6, at_most=1e6, when=FUSION)
    teacher_lr: float | None = key(None, "learning rate of teacher tensors in the A-Step; empty: `a_step_lr`",
                                   at_least=0, at_most=RATE["at_most"], when=TUNED)
    a_step_weight_decay: float = key(0.0, "weight decay of the A-Step, on matrices only", **DECAY, when=FUSION)
    schedule: ScheduleRecipe = key(ScheduleRecipe(), "learning rates over a run")
    # fmt: on

    @property
    def gate(self) -> float:
        """`enable_kd_after_syn_acc`, of a recipe that is complete: see `told_by_data.py`."""
        if self.enable_kd_after_syn_acc is None:
            raise ValueError("enable_kd_after_syn_acc is left to the data, which have not been asked")
        return self.enable_kd_after_syn_acc

    @property
    def base(self) -> str:
        """`synergy_base`, as told by the teachers where it is empty (SPEC 12)."""
        return self.synergy_base or ("mixture" if any(teacher.classes for teacher in self.teachers) else "avg")

    @property
    def kv(self) -> str:
        """`ib_mbm_kv`, likewise."""
        return self.ib_mbm_kv or ("feat_prob" if any(teacher.classes for teacher in self.teachers) else "feat")

    @property
    def distils_from_fusion(self) -> bool:
        """Whether there is a B-Step with a weight that asks for the fusion network."""
        asks = (self.kd_alpha > 0 and self.kd_target == "synergy") or self.feat_kd_alpha > 0
        return asks and not self.teachers_only

    @property
    def uses_fusion(self) -> bool:
        """Whether a fusion network is trained: if something distils from it. Adapters are built only then."""
        return self.teacher_adapt_epochs > 0 and self.distils_from_fusion

    @property
    def trains_teachers(self) -> bool:
        """Whether A-Steps train the teachers."""
        return self.uses_fusion and self.use_teacher_finetuning

    @property
    def folds(self) -> int:
        """How many copies each teacher has; 0: none."""
        return self.teacher_folds if self.uses_teachers else 0

    @property
    def reads_teachers_in_b(self) -> bool:
        """Whether the B-Step asks the teachers of anything."""
        return self.kd_alpha > 0 or self.feat_kd_alpha > 0

    @property
    def first_tau(self) -> float:
        """The temperature of each step's first epoch."""
        return self.tau_schedule[0] if self.tau_schedule else self.tau

    @property
    def student_shares(self) -> bool:
        """Whether the student's own logits have a share in what the B-Step distils."""
        return self.kd_alpha > 0 and (self.kd_student_share > 0 or bool(self.kd_student_share_end))

    @property
    def mixes(self) -> bool:
        """Whether the B-Step mixes images, so that teachers have to see what it makes of them."""
        return self.mixup_alpha > 0 or self.cutmix_alpha_distill > 0

    @property
    def uses_teachers(self) -> bool:
        """Whether anything the student learns from needs a teacher, or teachers are all there is to train."""
        return self.teachers_only or self.uses_fusion or self.reads_teachers_in_b

    @property
    def networks(self) -> dict[str, StudentRecipe | TeacherRecipe]:
        """The networks of the run by the names of their groups of keys: "model.student", "teacher1", ..."""
        teachers = self.teachers if self.uses_teachers else ()
        return {"model.student": self.model.student, **{f"teacher{k}": own for k, own in enumerate(teachers, 1)}}

    @property
    def trains_control(self) -> bool:
        """Whether the same student is trained without teachers, too."""
        return self.train_control and self.uses_teachers and not self.teachers_only

    @property
    def uses_adapters(self) -> bool:
        """Whether networks carry a distillation adapter."""
        return self.uses_fusion and self.use_distillation_adapter

    @property
    def student_feature(self) -> str:
        """Which student feature is the query and the one feature KD matches."""
        if not self.uses_fusion:
            return "feat_2d"  # no step would train an adapter
        return self.feat_kd_key or ("distill_feat" if self.use_distillation_adapter else "feat_2d")

    @property
    def a_epochs(self) -> int:
        """A-epochs of one stage (SPEC 4: cccp_nt times as many under use_cccp)."""
        return self.teacher_adapt_epochs * (self.cccp_nt if self.use_cccp else 1)

    @property
    def b_epochs(self) -> tuple[int, ...]:
        """B-epochs of each stage."""
        return tuple(epochs * (self.cccp_ns if self.use_cccp else 1) for epochs in self.student_epochs_per_stage)

    @property
    def compute_dtype(self) -> str:
        return self.amp_dtype if self.use_amp else "float32"
