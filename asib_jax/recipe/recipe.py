"""A configuration as frozen dataclasses of plain values: the only file that reads configuration keys.

Each field stands for the key of the same name in `configs/base.py`, where it is described; the two always match, since
a key without a field and a field without a key are both errors. What the values must satisfy is in `checks.py`.
"""
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from asib_jax.errors import UserError
from asib_jax.recipe.typed_groups import read_group


@dataclasses.dataclass(frozen=True)
class DatasetRecipe:
    name: str
    path: str
    data_dir: str
    batch_size: int
    data_aug: int
    small_input: bool
    val_fraction: float
    train_subset: int


@dataclasses.dataclass(frozen=True)
class StudentRecipe:
    name: str
    weights: str
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    use_adapter: bool


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    student: StudentRecipe


@dataclasses.dataclass(frozen=True)
class TeacherRecipe:
    name: str
    weights: str
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    saw_val: bool
    train_epochs: int
    train_lr: float
    train_weight_decay: float
    finetune_epochs: int
    finetune_lr: float
    finetune_weight_decay: float
    finetune_freeze_level: int
    warmup_epochs: int
    label_smoothing: float
    finetune_use_cutmix: bool
    finetune_cutmix_alpha: float
    early_stopping_patience: int
    early_stopping_min_delta: float
    freeze_level: tuple[int, ...]
    freeze_bn: bool

    @property
    def epochs(self) -> int:
        """Of supervised training here: fine-tuning of given weights, or from scratch; 0: ready as it is."""
        return self.finetune_epochs if self.weights else self.train_epochs

    @property
    def lr(self) -> float:
        return self.finetune_lr if self.weights else self.train_lr

    @property
    def weight_decay(self) -> float:
        return self.finetune_weight_decay if self.weights else self.train_weight_decay


@dataclasses.dataclass(frozen=True)
class ScheduleRecipe:
    type: str
    lr_warmup_epochs: int
    min_lr: float
    step_size: int
    gamma: float
    milestones: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a run needs to know. `teachers` gathers the groups teacher1, teacher2, ... in order."""
    # run
    seed: int
    results_dir: str
    exp_id: str
    num_stages: int
    student_epochs_per_stage: tuple[int, ...]
    teacher_adapt_epochs: int
    restore_best: bool
    train_control: bool
    num_devices: int
    scale_lr_with_devices: bool
    steps_per_call: int
    device_data_gb: float
    use_amp: bool
    amp_dtype: str
    tensorboard: bool
    wandb: str
    compilation_cache: str
    resume: str
    checkpoint_minutes: float
    checkpoint_steps: int
    max_nonfinite_steps: int
    deterministic: bool
    platform: str
    profile_steps: tuple[int, ...]
    # data and networks
    dataset: DatasetRecipe
    model: ModelRecipe
    teachers: tuple[TeacherRecipe, ...]
    a_step_views: int
    b_step_views: int
    bank_memory_gb: float
    teacher_cache: str
    teachers_only: bool
    # distillation
    kd_target: str
    kd_teacher_index: int
    ce_alpha: float
    kd_alpha: float
    kd_max_ratio: float
    kd_warmup_epochs: int
    kd_ens_alpha: float
    teacher_adapt_kd_warmup: int
    tau: float
    tau_schedule: tuple[float, ...]
    tau_decay_power: float
    feat_kd_alpha: float
    feat_kd_key: str
    use_loss_clamp: bool
    loss_clamp_max: float
    ce_label_smoothing: float
    mixup_alpha: float
    cutmix_alpha_distill: float
    use_disagree_weight: bool
    disagree_mode: str
    disagree_lambda_high: float
    disagree_lambda_low: float
    use_partial_freeze: bool
    student_freeze_level: tuple[int, ...]
    student_freeze_bn: bool
    # fusion
    use_distillation_adapter: bool
    distill_out_dim: int
    distill_hidden_dim: int
    use_ib: bool
    ib_beta: float
    ib_beta_warmup_epochs: int
    beta_schedule: tuple[float, ...]
    ib_mbm_out_dim: int
    ib_mbm_n_head: int
    ib_mbm_feature_norm: str
    ib_mbm_residual: bool
    ib_mbm_logvar_clip: float
    ib_mbm_min_std: float
    ib_mbm_reg_lambda: float
    synergy_head_dropout: float
    synergy_temp_learnable: bool
    min_cw: float
    synergy_only_epochs: int
    enable_kd_after_syn_acc: float
    synergy_ce_alpha: float
    synergy_kd_alpha: float
    synergy_ema_alpha: float
    label_smoothing: float
    teacher_adapt_alpha_kd: float | None
    use_cccp: bool
    cccp_alpha: float
    cccp_nt: int
    cccp_ns: int
    train_distill_adapter_only: bool
    use_teacher_finetuning: bool
    reg_lambda: float
    # optimisation
    optimizer: str
    momentum: float
    student_lr: float
    student_weight_decay: float
    grad_clip_norm: float
    a_step_lr: float
    ib_mbm_lr_factor: float
    teacher_lr: float | None
    a_step_weight_decay: float
    schedule: ScheduleRecipe

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
    def reads_teachers_in_b(self) -> bool:
        """Whether the B-Step asks the teachers of anything."""
        return self.kd_alpha > 0 or self.feat_kd_alpha > 0

    @property
    def mixes(self) -> bool:
        """Whether the B-Step mixes images, so that teachers have to see what it makes of them."""
        return self.mixup_alpha > 0 or self.cutmix_alpha_distill > 0

    @property
    def uses_teachers(self) -> bool:
        """Whether anything the student learns from needs a teacher, or teachers are all there is to train."""
        return self.teachers_only or self.uses_fusion or self.reads_teachers_in_b

    @property
    def uses_adapters(self) -> bool:
        """Whether networks carry a distillation adapter."""
        return self.uses_fusion and self.use_distillation_adapter

    @property
    def student_feature(self) -> str:
        """Which student feature is the query and the one feature KD matches."""
        return self.feat_kd_key or ("distill_feat" if self.uses_adapters else "feat_2d")

    @property
    def a_epochs(self) -> int:
        """A-epochs of one stage (SPEC 4: cccp_nt times as many under use_cccp)."""
        return self.teacher_adapt_epochs * (self.cccp_nt if self.use_cccp else 1)

    @property
    def b_epochs(self) -> tuple[int, ...]:
        """B-epochs of each stage."""
        factor = self.cccp_ns if self.use_cccp else 1
        return tuple(epochs * factor for epochs in self.student_epochs_per_stage)

    @property
    def compute_dtype(self) -> str:
        return self.amp_dtype if self.use_amp else "float32"


def read(config: Mapping[str, Any]) -> Recipe:
    """The recipe `config` (a ConfigDict or a nested dict) describes.

    Raises:
      UserError: a key is unknown (the nearest valid one is named), missing or of the wrong type.
    """
    if not hasattr(config, "items"):
        raise UserError(f"a configuration is a group of keys; found a {type(config).__name__}")
    config = dict(config.items())
    if "teachers" in config:
        raise UserError("unknown key teachers; teachers are the groups teacher1, teacher2, ...")
    names = sorted((key for key in config if re.fullmatch("teacher[0-9]{1,9}", str(key))), key=lambda key: int(key[7:]))
    if names != [f"teacher{k + 1}" for k in range(len(names))]:
        raise UserError(f"teachers must be named teacher1, teacher2, ... without a gap; found {names}")
    groups = tuple(read_group(TeacherRecipe, config.pop(name), f"{name}.") for name in names)
    return read_group(Recipe, {**config, "teachers": groups}, "")
