"""What a recipe must satisfy, checked before any work."""
import importlib.util
import math
import os
import re
from pathlib import Path

from asib_jax import models
from asib_jax.engine import parallel
from asib_jax.objectives import freezing, losses, schedules
from asib_jax.tools import device_check
from asib_jax.weights import files as weights
from asib_jax.data.augment import POLICIES
from asib_jax.data.sources import SOURCES
from asib_jax.errors import UserError
from asib_jax.data.paths import expanded
from asib_jax.recipe.recipe import Recipe, StudentRecipe, TeacherRecipe
from asib_jax.recipe.typed_groups import flat

_AT_LEAST = {  # key: smallest value
    "seed": 0, "teacher_adapt_epochs": 0, "num_devices": 0, "a_step_views": 0, "b_step_views": 0,
    "steps_per_call": 0, "device_data_gb": 0, "bank_memory_gb": 0, "kd_teacher_index": 0,
    "ce_alpha": 0, "kd_alpha": 0, "kd_max_ratio": 0, "kd_warmup_epochs": 0, "teacher_adapt_kd_warmup": 0,
    "feat_kd_alpha": 0, "mixup_alpha": 0, "cutmix_alpha_distill": 0, "disagree_lambda_high": 0,
    "disagree_lambda_low": 0, "distill_out_dim": 1, "distill_hidden_dim": 0, "ib_beta": 0,
    "ib_beta_warmup_epochs": 0, "ib_mbm_out_dim": 1, "ib_mbm_n_head": 1, "ib_mbm_reg_lambda": 0,
    "synergy_only_epochs": 0, "synergy_ce_alpha": 0, "synergy_kd_alpha": 0, "cccp_alpha": 0, "cccp_nt": 1,
    "cccp_ns": 1, "reg_lambda": 0, "student_weight_decay": 0, "grad_clip_norm": 0,
    "a_step_weight_decay": 0, "tau_decay_power": 0, "checkpoint_minutes": 0, "checkpoint_steps": 0,
    "max_nonfinite_steps": 1,
}
_POSITIVE = ("tau", "loss_clamp_max", "ib_mbm_logvar_clip", "ib_mbm_min_std", "min_cw", "student_lr", "a_step_lr",
             "ib_mbm_lr_factor")
_SHARES = ("kd_ens_alpha", "ce_label_smoothing", "label_smoothing", "synergy_head_dropout", "synergy_ema_alpha",
           "enable_kd_after_syn_acc", "momentum")
_CHOICES = {
    "kd_target": ("synergy", *losses.KD_TARGETS), "disagree_mode": tuple(losses.DISAGREE_MODES),
    "ib_mbm_feature_norm": ("none", "l2"), "optimizer": ("adamw", "sgd"),
    "amp_dtype": ("bfloat16", "float16", "float32"),
    "feat_kd_key": ("", "distill_feat", "feat_2d"), "platform": ("", "gpu", "cpu"),
}
_INT_LIMIT = 2**31  # steps, rows and seeds are 32 bits wide on devices
_IMAGENET = re.compile(r"hf:.*[._]in(1|12|21|22)k")  # timm's repositories are named so


def check(recipe: Recipe) -> None:
    """Raise UserError, naming the value, the choices and the key, for a recipe that cannot be run as it says."""
    _check_numbers(recipe)
    for key, least in _AT_LEAST.items():
        _require(getattr(recipe, key) >= least, f"{key}={getattr(recipe, key)} must be at least {least}")
    for key in _POSITIVE:
        _require(getattr(recipe, key) > 0, f"{key}={getattr(recipe, key)} must be positive")
    for key in _SHARES:
        _require(0 <= getattr(recipe, key) <= 1, f"{key}={getattr(recipe, key)} must lie in [0, 1]")
    for key, choices in _CHOICES.items():
        value = getattr(recipe, key)
        _require(value in choices, f"{key}={value!r}; valid: {', '.join(map(repr, choices))}")
    _check_student(recipe)
    device_check.check_platform(device_check.all_devices(), recipe.platform, "platform")
    parallel.check_batch(recipe.dataset.batch_size, parallel.run_devices(recipe.num_devices))
    _require(recipe.dataset.name in SOURCES, f"dataset.name={recipe.dataset.name!r}; valid: {', '.join(SOURCES)}")
    _check_run(recipe)
    _check_lengths(recipe)
    if recipe.use_partial_freeze:
        _check_levels(recipe, recipe.model.student.name, recipe.student_freeze_level, "student_freeze_level")
    _check_training(recipe)
    _check_teachers(recipe)
    if recipe.uses_fusion:
        _check_fusion(recipe)


def check_data(recipe: Recipe, image_shape: tuple[int, ...], num_classes: int) -> None:
    """UserError for a recipe that does not fit images [H, W, channels] of so many classes."""
    if recipe.uses_fusion:
        check_gate(recipe.enable_kd_after_syn_acc, num_classes)
    networks = {"model.student": recipe.model.student}
    if recipe.uses_teachers:
        networks |= {f"teacher{k}": teacher for k, teacher in enumerate(recipe.teachers, 1)}
    for key, network in networks.items():
        for name, values in (("mean", network.mean), ("std", network.std)):
            _require(len(values) in (1, image_shape[-1]),
                     f"{key}.{name}={values} has {len(values)} values, the images have {image_shape[-1]} channels: "
                     f"give one value, or {image_shape[-1]}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_numbers(recipe: Recipe) -> None:
    """Comparisons with nan are false, and what is too large wraps around: both would pass other checks."""
    for key, value in flat(recipe).items():
        for number in value if isinstance(value, tuple) else (value,):
            _require(not isinstance(number, float) or math.isfinite(number), f"{key}={value} must be finite")
            _require(not isinstance(number, int) or abs(number) < _INT_LIMIT,
                     f"{key}={value} must be less than 2**31 = {_INT_LIMIT}")


def _check_run(recipe: Recipe) -> None:
    _require(not recipe.exp_id or recipe.resume in ("", "latest") or Path(recipe.resume).name == recipe.exp_id,
             f"exp_id={recipe.exp_id!r} is not the run of resume={recipe.resume!r}; leave one of them empty")
    _require(not recipe.wandb or importlib.util.find_spec("wandb") is not None,
             f"wandb={recipe.wandb!r} needs the wandb package: pip install wandb, or set wandb to \"\"")
    cache = expanded(recipe.teacher_cache, "teacher_cache")
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    _require(not recipe.teacher_cache or (there.is_dir() and os.access(there, os.W_OK)),
             f"teacher_cache={recipe.teacher_cache!r}: {there} is no folder that can be written; name another, or none")


def _check_student(recipe: Recipe) -> None:
    student = recipe.model.student
    models.backbone(student.name, recipe.dataset.small_input, "model.student.name")
    _check_pixels(student, "model.student")
    _require(not student.name.endswith("_pretrain") or bool(student.weights),
             f"model.student.name={student.name!r} needs model.student.weights, or use the name with _scratch")
    _require(not student.name.endswith("_scratch") or not student.weights,
             f"model.student.name={student.name!r} trains from scratch, but model.student.weights={student.weights!r}; "
             f"use the name with _pretrain")
    _check_source(student, "model.student.weights")


def _check_pixels(network: StudentRecipe | TeacherRecipe, key: str) -> None:
    _require(all(value > 0 for value in network.std), f"{key}.std={network.std} must be positive: pixels are divided "
             "by it")


def _check_lengths(recipe: Recipe) -> None:
    stages = len(recipe.student_epochs_per_stage)
    _require(stages > 0, "student_epochs_per_stage is empty; give the B-epochs of each stage, e.g. (20, 20)")
    _require(min(recipe.student_epochs_per_stage) > 0,
             f"student_epochs_per_stage={recipe.student_epochs_per_stage}: every stage needs at least one epoch")
    _require(recipe.num_stages in (0, stages),
             f"num_stages={recipe.num_stages}, but student_epochs_per_stage has {stages} entries; 0 takes its length")
    levels = {"student_freeze_level": recipe.student_freeze_level}
    levels |= {f"teacher{k}.freeze_level": t.freeze_level for k, t in enumerate(recipe.teachers, 1)}
    for key, value in levels.items():
        _require(len(value) in (1, stages),
                 f"{key}={value} has {len(value)} entries; give one, or one per stage ({stages})")
    for key, lengths in {"tau_schedule": (0, 2), "beta_schedule": (0, 3), "profile_steps": (0, 2)}.items():
        value = getattr(recipe, key)
        _require(len(value) in lengths, f"{key}={value} needs {lengths[1]} entries, or none")
    steps = list(recipe.profile_steps)
    _require(steps == sorted(steps) and min(steps, default=0) >= 0,
             f"profile_steps={recipe.profile_steps} must be the first and the last step, from 0")
    _require(all(tau > 0 for tau in recipe.tau_schedule), f"tau_schedule={recipe.tau_schedule} must be positive")
    _require(all(value >= 0 for value in recipe.beta_schedule),
             f"beta_schedule={recipe.beta_schedule} must not be negative")


def _check_levels(recipe: Recipe, network: str, levels: tuple[int, ...], key: str) -> None:
    stages = models.backbone(network, recipe.dataset.small_input, key).stages
    for level in levels:
        freezing.frozen_stages(level, len(stages), key)


def _check_training(recipe: Recipe) -> None:
    losses.renormalise_alphas(recipe.ce_alpha, recipe.kd_alpha)
    schedule, data = recipe.schedule, recipe.dataset
    _require(schedule.type in schedules.SCHEDULES, f"schedule.type={schedule.type!r}; valid: {schedules.SCHEDULES}")
    warmup = f"schedule.lr_warmup_epochs={schedule.lr_warmup_epochs}"
    _require(schedule.lr_warmup_epochs >= 0, f"{warmup} must be at least 0")
    _check_min_lr(recipe, "student_lr", recipe.student_lr)
    if recipe.uses_fusion:
        _check_min_lr(recipe, "a_step_lr", recipe.a_step_lr)
    _require(schedule.gamma > 0, f"schedule.gamma={schedule.gamma} must be positive")
    _require(schedule.step_size >= 1, f"schedule.step_size={schedule.step_size} must be at least 1")
    milestones = schedule.milestones
    _require(min(milestones, default=1) > 0 and list(milestones) == sorted(set(milestones)),
             f"schedule.milestones={milestones} must be epochs from 1 in rising order, each once")
    totals = {"B": sum(recipe.b_epochs)}
    if recipe.uses_fusion:
        totals["A"] = recipe.a_epochs * len(recipe.b_epochs)
    for step, total in totals.items():
        _require(schedule.lr_warmup_epochs <= total, f"{warmup} is longer than the {total} {step}-epochs of the run; "
                 f"set --config.schedule.lr_warmup_epochs={total} or fewer")
    _require(data.name != "digits" or not data.path,
             f"dataset.path={data.path!r}, but the digits come with scikit-learn; set dataset.name")
    _require(data.batch_size > 0, f"dataset.batch_size={data.batch_size} must be positive")
    _require(data.data_aug in POLICIES, f"dataset.data_aug={data.data_aug}; valid: {sorted(POLICIES)}")
    _require(0 < data.val_fraction < 1, f"dataset.val_fraction={data.val_fraction} must lie between 0 and 1")
    _require(data.train_subset >= 0, f"dataset.train_subset={data.train_subset} must be at least 0 (0: all images)")
    _require(not (recipe.mixup_alpha and recipe.cutmix_alpha_distill),
             "mixup_alpha and cutmix_alpha_distill are both set; set one of them to 0")


def _check_teachers(recipe: Recipe) -> None:
    if not recipe.uses_teachers:
        return
    count = len(recipe.teachers)
    _require(count >= (2 if recipe.uses_fusion else 1), f"{count} teachers configured; synergy needs two, any other "
             f"kd_target one: add teacher{count + 1}")
    if recipe.kd_target == "teacher":
        _require(recipe.kd_teacher_index < count,
                 f"kd_teacher_index={recipe.kd_teacher_index}, but teachers are 0..{count - 1}")
    _require(recipe.uses_fusion or not recipe.distils_from_fusion,
             f"kd_target={recipe.kd_target!r} with feat_kd_alpha={recipe.feat_kd_alpha} distils from the fusion network, "
             f"which an A-Step fits; set teacher_adapt_epochs, or kd_target='avg' and feat_kd_alpha=0")
    for k, teacher in enumerate(recipe.teachers, 1):
        models.backbone(teacher.name, recipe.dataset.small_input, f"teacher{k}.name")
        _check_pixels(teacher, f"teacher{k}")
        if recipe.use_partial_freeze and recipe.use_teacher_finetuning:
            _check_levels(recipe, teacher.name, teacher.freeze_level, f"teacher{k}.freeze_level")
        _check_weights(recipe, teacher, f"teacher{k}")
        for key in ("train_epochs", "finetune_epochs", "early_stopping_patience", "early_stopping_min_delta"):
            _require(getattr(teacher, key) >= 0, f"teacher{k}.{key}={getattr(teacher, key)} must be at least 0")
        if teacher.epochs:
            _check_teacher_training(recipe, teacher, f"teacher{k}")


def _check_weights(recipe: Recipe, teacher: TeacherRecipe, key: str) -> None:
    given = bool(teacher.weights)
    _require(given or teacher.train_epochs > 0,
             f"{key} ({teacher.name}) has no weights: set {key}.weights to a file or hf:OWNER/REPO, or "
             f"{key}.train_epochs to train it here from scratch")
    _require(given or not teacher.name.endswith("_pretrain"),
             f"{key}.name={teacher.name!r} needs {key}.weights, or use the name without _pretrain")
    _require(not given or not teacher.name.endswith("_scratch"),
             f"{key}.name={teacher.name!r} trains from scratch, but {key}.weights={teacher.weights!r}; use the name "
             "without _scratch")
    _require(not (given and teacher.train_epochs),
             f"{key}.weights and {key}.train_epochs are both set; keep one, or fine-tune with {key}.finetune_epochs")
    _require(given or not teacher.finetune_epochs,
             f"{key}.finetune_epochs={teacher.finetune_epochs} needs {key}.weights; to train from scratch set "
             f"{key}.train_epochs")
    _check_source(teacher, f"{key}.weights")
    _require(recipe.dataset.name != "imagenet32" or teacher.saw_val or not _IMAGENET.match(teacher.weights),
             f"{key}.saw_val=False, but {key}.weights={teacher.weights!r} were fitted on ImageNet, of whose training "
             f"images the validation split of dataset.name='imagenet32' is a part; set {key}.saw_val=True")


def _check_source(options: StudentRecipe | TeacherRecipe, key: str) -> None:
    """A file or folder of weights must be here already; one of the hub is fetched, or missed, when the run starts."""
    given, network, sha256 = options.weights, options.name, options.weights_sha256
    _require(not sha256 or re.fullmatch("[0-9a-fA-F]{64}", sha256) is not None,
             f"{key}_sha256={sha256!r} must be 64 hexadecimal digits, as sha256sum prints them")
    _require(not given or weights.cached(given) is not None or given.startswith("hf:"),
             f"{key}={given!r} does not exist")
    tensorflow = any(part.startswith("tf_efficientnet") for part in given.split("/"))
    _require(not tensorflow or network.startswith("efficientnet_l2"),
             f"{key}={given!r} were trained in TensorFlow, with another padding and BatchNorm epsilon than {network} "
             "has: take the repository without tf_")


def _check_teacher_training(recipe: Recipe, teacher: TeacherRecipe, key: str) -> None:
    mode = "finetune" if teacher.weights else "train"
    _require(0 <= teacher.warmup_epochs <= teacher.epochs,
             f"{key}.warmup_epochs={teacher.warmup_epochs} must lie between 0 and {key}.{mode}_epochs="
             f"{teacher.epochs}; set --config.{key}.warmup_epochs={min(1, teacher.epochs)}")
    _require(teacher.lr > 0, f"{key}.{mode}_lr={teacher.lr} must be positive")
    _require(teacher.weight_decay >= 0, f"{key}.{mode}_weight_decay={teacher.weight_decay} must be at least 0")
    _check_min_lr(recipe, f"{key}.{mode}_lr", teacher.lr)
    _require(teacher.early_stopping_min_delta <= 1,
             f"{key}.early_stopping_min_delta={teacher.early_stopping_min_delta} must lie in [0, 1]")
    _require(0 <= teacher.label_smoothing < 1,
             f"{key}.label_smoothing={teacher.label_smoothing} must lie in [0, 1)")
    _require(not teacher.finetune_use_cutmix or teacher.finetune_cutmix_alpha > 0,
             f"{key}.finetune_cutmix_alpha={teacher.finetune_cutmix_alpha} must be positive with finetune_use_cutmix")
    if teacher.weights:
        _check_levels(recipe, teacher.name, (teacher.finetune_freeze_level,), f"{key}.finetune_freeze_level")


def _check_min_lr(recipe: Recipe, key: str, rate: float) -> None:
    schedule = recipe.schedule
    _require(0 <= schedule.min_lr and (schedule.type != "cosine" or schedule.min_lr <= rate),
             f"schedule.min_lr={schedule.min_lr} must lie between 0 and {key}={rate}")


def _check_fusion(recipe: Recipe) -> None:
    _require(recipe.ib_mbm_out_dim % recipe.ib_mbm_n_head == 0,
             f"ib_mbm_out_dim={recipe.ib_mbm_out_dim} does not divide by ib_mbm_n_head={recipe.ib_mbm_n_head}")
    _require(2 * math.log(recipe.ib_mbm_min_std) < recipe.ib_mbm_logvar_clip,
             f"ib_mbm_min_std={recipe.ib_mbm_min_std} is above what ib_mbm_logvar_clip={recipe.ib_mbm_logvar_clip} "
             "allows")
    _require(recipe.synergy_ce_alpha + recipe.synergy_kd_alpha > 0,
             "synergy_ce_alpha and synergy_kd_alpha are both 0; the A-Step would have nothing to fit")
    for key in ("teacher_lr", "teacher_adapt_alpha_kd"):
        value = getattr(recipe, key)
        _require(value is None or value >= 0, f"{key}={value} must be at least 0")
    _require(recipe.use_distillation_adapter or not recipe.train_distill_adapter_only,
             "train_distill_adapter_only needs use_distillation_adapter")
    _require(recipe.synergy_head_dropout < 1, "synergy_head_dropout=1 drops everything")
    _require(recipe.min_cw <= 1, f"min_cw={recipe.min_cw} must be at most 1")
    _require(not recipe.use_ib or len(recipe.b_epochs) > 1 or recipe.synergy_only_epochs < recipe.a_epochs,
             f"synergy_only_epochs={recipe.synergy_only_epochs} covers all {recipe.a_epochs} A-epochs of the only "
             "stage: the bottleneck (use_ib) would never be on")
    if recipe.feat_kd_key == "distill_feat":
        _require(recipe.use_distillation_adapter, "feat_kd_key='distill_feat' needs use_distillation_adapter")
    if recipe.feat_kd_alpha > 0 and recipe.student_feature == "distill_feat":
        _require(recipe.distill_out_dim == recipe.ib_mbm_out_dim,
                 f"feature KD compares the student's distill_out_dim={recipe.distill_out_dim} with ib_mbm_out_dim="
                 f"{recipe.ib_mbm_out_dim}; make them equal or set feat_kd_alpha=0")
    _require(not (recipe.use_teacher_finetuning and recipe.train_distill_adapter_only),
             "use_teacher_finetuning and train_distill_adapter_only exclude each other; keep one")


def check_gate(threshold: float, num_classes: int) -> str | None:
    """UserError for a gate below chance (SPEC 4); a warning text for one below 1.5 times chance."""
    key = f"enable_kd_after_syn_acc={threshold:g}"
    _require(threshold >= 1 / num_classes, f"{key} is below chance for {num_classes} classes (1/{num_classes})")
    if threshold < 1.5 / num_classes:
        return f"{key} is less than 1.5 times chance ({1 / num_classes:g}): the gate will open almost at once"
    return None
