"""What a recipe must satisfy, whatever the machine: each key's own range or choices, and what relates several keys."""

import math
import re
from pathlib import Path

from asib_jax import models
from asib_jax.errors import UserError
from asib_jax.objectives import freezing, losses
from asib_jax.recipe import fold_checks, keys, ranges, told_by_data
from asib_jax.recipe.groups import StudentRecipe, TeacherRecipe
from asib_jax.recipe.recipe import Recipe

_IMAGENET = re.compile(r"hf:.*[._]in(1|12|21|22)k")  # timm's repositories are named so
_MOST_EPOCHS = 1_000_000  # of a step over the run: each is listed before the first


def check(recipe: Recipe) -> None:
    """Raise UserError, naming the value, the choices and the key, for a recipe that cannot be run as it says."""
    keys.check(recipe)
    _require(
        not recipe.exp_id or recipe.resume in ("", "latest") or Path(recipe.resume).name == recipe.exp_id,
        f"exp_id={recipe.exp_id!r} is not the run of resume={recipe.resume!r}; leave one of them empty",
    )
    _require(bool(recipe.results_dir), "results_dir is empty; name a folder, '.' for the current one")
    _check_student(recipe)
    _check_lengths(recipe)
    _check_training(recipe)
    if recipe.uses_teachers:
        _check_teachers(recipe)
    if recipe.uses_fusion:
        _check_fusion(recipe)
    fold_checks.check(recipe)


def check_data(recipe: Recipe, image_shape: tuple[int, ...], num_classes: int) -> None:
    """UserError for a complete recipe that does not fit images [H, W, channels] of so many classes."""
    if recipe.uses_fusion:
        check_gate(recipe.gate, num_classes)
    channels = image_shape[-1]
    for key, network in recipe.networks.items():
        for name, values in (("mean", network.mean), ("std", network.std)):
            _require(
                len(values) in (1, channels),
                f"{key}.{name}={values} has {len(values)} values, the images have {channels} channels: "
                f"give one value{f', or {channels}' if channels > 1 else ''}",
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_student(recipe: Recipe) -> None:
    student = recipe.model.student
    models.backbone(student.name, recipe.dataset.small_input, "model.student.name")
    _require(
        not student.name.endswith("_pretrain") or bool(student.weights),
        f"model.student.name={student.name!r} needs model.student.weights, or use the name with _scratch",
    )
    _require(
        not student.name.endswith("_scratch") or not student.weights,
        f"model.student.name={student.name!r} trains from scratch, but model.student.weights={student.weights!r}; "
        f"use the name with _pretrain",
    )
    _check_source(recipe, student, "model.student")


def _check_lengths(recipe: Recipe) -> None:
    stages = len(recipe.student_epochs_per_stage)
    _require(stages > 0, "student_epochs_per_stage is empty; give the B-epochs of each stage, e.g. (20, 20)")
    _require(
        recipe.num_stages in (0, stages),
        f"num_stages={recipe.num_stages}, but student_epochs_per_stage has {stages} entries; 0 takes its length",
    )
    levels = {"student_freeze_level": recipe.student_freeze_level}
    levels |= {f"teacher{k}.freeze_level": t.freeze_level for k, t in enumerate(recipe.teachers, 1)}
    for key, value in levels.items():
        _require(
            len(value) in (1, stages), f"{key}={value} has {len(value)} entries; give one, or one per stage ({stages})"
        )
    steps = recipe.profile_steps
    _require(list(steps) == sorted(steps), f"profile_steps={steps} must be the first and the last step")
    milestones = recipe.schedule.milestones
    _require(
        list(milestones) == sorted(set(milestones)),
        f"schedule.milestones={milestones} must be epochs in rising order, each once",
    )
    if recipe.use_partial_freeze:
        _check_levels(recipe, recipe.model.student.name, recipe.student_freeze_level, "student_freeze_level")


def _check_levels(recipe: Recipe, network: str, levels: tuple[int, ...], key: str) -> None:
    stages = models.backbone(network, recipe.dataset.small_input, key).stages
    for level in levels:
        freezing.frozen_stages(level, len(stages), key)


def _check_training(recipe: Recipe) -> None:
    losses.renormalise_alphas(recipe.ce_alpha, recipe.kd_alpha)
    _check_min_lr(recipe, "student_lr", recipe.student_lr)
    totals = {"B": sum(recipe.b_epochs)}
    if recipe.uses_fusion:
        _check_min_lr(recipe, "a_step_lr", recipe.a_step_lr)
        totals["A"] = recipe.a_epochs * len(recipe.b_epochs)
    for step, total in totals.items():
        warmup = recipe.schedule.lr_warmup_epochs
        _require(
            total <= _MOST_EPOCHS,
            f"the run has {total} {step}-epochs, more than {_MOST_EPOCHS}: see student_epochs_per_stage, "
            "teacher_adapt_epochs, cccp_nt and cccp_ns",
        )
        _require(
            warmup <= total,
            f"schedule.lr_warmup_epochs={warmup} is longer than the {total} {step}-epochs of the run; set "
            f"--config.schedule.lr_warmup_epochs={total} or fewer",
        )
    _require(
        recipe.dataset.name != "digits" or not recipe.dataset.path,
        f"dataset.path={recipe.dataset.path!r}, but dataset.name='digits', which come with scikit-learn: take the "
        "profile `:own` instead of `:digits`, or set dataset.name",
    )
    _require(
        not (recipe.mixup_alpha and recipe.cutmix_alpha_distill),
        "mixup_alpha and cutmix_alpha_distill are both set; set one of them to 0",
    )


def _check_teachers(recipe: Recipe) -> None:
    count = len(recipe.teachers)
    _require(
        count >= (2 if recipe.uses_fusion else 1),
        f"{count} teachers configured; synergy needs two, any other kd_target one: add teacher{count + 1}",
    )
    if recipe.kd_target == "teacher":
        _require(
            recipe.kd_teacher_index < count,
            f"kd_teacher_index={recipe.kd_teacher_index}, but teachers are 0..{count - 1}",
        )
    if recipe.kd_target == "label_conf" and recipe.kd_alpha > 0:
        instead = "take a target without labels, such as kd_target='entropy'"
        _require(recipe.ce_alpha > 0, f"kd_target='label_conf' needs the labels that ce_alpha=0 leaves out; {instead}")
        _require(
            not recipe.mixes,
            "kd_target='label_conf' needs one label an image, which mixup_alpha or cutmix_alpha_distill gives two; set "
            f"them to 0, or {instead}",
        )
    _require(
        not recipe.use_disagree_weight or recipe.disagree_lambda_high + recipe.disagree_lambda_low > 0,
        "disagree_lambda_high and disagree_lambda_low are both 0: nothing would be distilled; set one of them",
    )
    _require(
        recipe.uses_fusion or not recipe.distils_from_fusion,
        f"kd_target={recipe.kd_target!r} with feat_kd_alpha={recipe.feat_kd_alpha} distils from the fusion "
        f"network, which an A-Step fits; set teacher_adapt_epochs, or kd_target='avg' and feat_kd_alpha=0",
    )
    for k, teacher in enumerate(recipe.teachers, 1):
        models.backbone(teacher.name, recipe.dataset.small_input, f"teacher{k}.name")
        if recipe.use_partial_freeze and recipe.use_teacher_finetuning:
            _check_levels(recipe, teacher.name, teacher.freeze_level, f"teacher{k}.freeze_level")
        _check_weights(recipe, teacher, f"teacher{k}")
        _check_temperature(teacher, f"teacher{k}")
        if teacher.epochs:
            _check_teacher_training(recipe, teacher, f"teacher{k}")


def _check_temperature(teacher: TeacherRecipe, key: str) -> None:
    least, most = ranges.TEMPERATURE["at_least"], ranges.TEMPERATURE["at_most"]
    _require(
        teacher.temperature == 0 or teacher.temperature >= least,
        f"{key}.temperature={teacher.temperature} must be in [{least}, {most}], or 0, which finds it",
    )
    _require(
        teacher.temperature > 0 or not teacher.saw_validation,
        f"{key}.temperature=0 compares training with validation images, but {key}.weights were fitted on both "
        f"({key}.saw_val=True): give a temperature, or set {key}.saw_val=False if they were not",
    )


def _check_weights(recipe: Recipe, teacher: TeacherRecipe, key: str) -> None:
    given = bool(teacher.weights)
    _require(
        given or teacher.train_epochs > 0,
        f"{key} ({teacher.name}) has no weights: set {key}.weights to a file or hf:OWNER/REPO, or "
        f"{key}.train_epochs to train it here from scratch",
    )
    _require(
        given or not teacher.name.endswith("_pretrain"),
        f"{key}.name={teacher.name!r} needs {key}.weights, or use the name without _pretrain",
    )
    _require(
        not given or not teacher.name.endswith("_scratch"),
        f"{key}.name={teacher.name!r} trains from scratch, but {key}.weights={teacher.weights!r}; use the name "
        "without _scratch",
    )
    _require(
        not (given and teacher.train_epochs),
        f"{key}.weights and {key}.train_epochs are both set; keep one, or fine-tune with {key}.finetune_epochs",
    )
    _require(
        given or not teacher.finetune_epochs,
        f"{key}.finetune_epochs={teacher.finetune_epochs} needs {key}.weights; to train from scratch set "
        f"{key}.train_epochs",
    )
    _check_source(recipe, teacher, key)


def _check_source(recipe: Recipe, options: StudentRecipe | TeacherRecipe, key: str) -> None:
    given, network, sha256 = options.weights, options.name, options.weights_sha256
    _require(
        recipe.dataset.name != "imagenet32" or options.saw_val or not _IMAGENET.match(given),
        f"{key}.saw_val=False, but {key}.weights={given!r} were fitted on ImageNet, of whose training images the "
        f"validation split of dataset.name='imagenet32' is a part; set {key}.saw_val=True",
    )
    _require(
        not sha256 or re.fullmatch("[0-9a-fA-F]{64}", sha256) is not None,
        f"{key}.weights_sha256={sha256!r} must be 64 hexadecimal digits, as sha256sum prints them",
    )
    tensorflow = any(part.startswith("tf_efficientnet") for part in given.split("/"))
    _require(
        not tensorflow or network.startswith("efficientnet_l2"),
        f"{key}.weights={given!r} were trained in TensorFlow, with another padding and BatchNorm epsilon than "
        f"{network} has: take the repository without tf_",
    )


def _check_teacher_training(recipe: Recipe, teacher: TeacherRecipe, key: str) -> None:
    mode = "finetune" if teacher.weights else "train"
    _require(
        teacher.warmup_epochs <= teacher.epochs,
        f"{key}.warmup_epochs={teacher.warmup_epochs} must lie between 0 and {key}.{mode}_epochs="
        f"{teacher.epochs}; set --config.{key}.warmup_epochs={min(1, teacher.epochs)}",
    )
    _check_min_lr(recipe, f"{key}.{mode}_lr", teacher.lr)
    if teacher.weights:
        _check_levels(recipe, teacher.name, (teacher.finetune_freeze_level,), f"{key}.finetune_freeze_level")


def _check_min_lr(recipe: Recipe, key: str, rate: float) -> None:
    schedule = recipe.schedule
    _require(
        schedule.type != "cosine" or schedule.min_lr <= rate,
        f"schedule.min_lr={schedule.min_lr} must lie between 0 and {key}={rate}",
    )


def _check_fusion(recipe: Recipe) -> None:
    _require(
        recipe.ib_mbm_out_dim % recipe.ib_mbm_n_head == 0,
        f"ib_mbm_out_dim={recipe.ib_mbm_out_dim} does not divide by ib_mbm_n_head={recipe.ib_mbm_n_head}",
    )
    _require(
        2 * math.log(recipe.ib_mbm_min_std) < recipe.ib_mbm_logvar_clip,
        f"ib_mbm_min_std={recipe.ib_mbm_min_std} is above what ib_mbm_logvar_clip={recipe.ib_mbm_logvar_clip} allows",
    )
    _require(
        recipe.synergy_ce_alpha + recipe.synergy_kd_alpha > 0,
        "synergy_ce_alpha and synergy_kd_alpha are both 0; the A-Step would have nothing to fit",
    )
    _require(
        recipe.use_distillation_adapter or not recipe.train_distill_adapter_only,
        "train_distill_adapter_only needs use_distillation_adapter",
    )
    _require(
        not recipe.use_ib or len(recipe.b_epochs) > 1 or recipe.synergy_only_epochs < recipe.a_epochs,
        f"synergy_only_epochs={recipe.synergy_only_epochs} covers all {recipe.a_epochs} A-epochs of the only "
        "stage: the bottleneck (use_ib) would never be on",
    )
    if recipe.feat_kd_key == "distill_feat":
        _require(recipe.use_distillation_adapter, "feat_kd_key='distill_feat' needs use_distillation_adapter")
    if recipe.feat_kd_alpha > 0 and recipe.student_feature == "distill_feat":
        _require(
            recipe.distill_out_dim == recipe.ib_mbm_out_dim,
            f"feature KD compares the student's distill_out_dim={recipe.distill_out_dim} with ib_mbm_out_dim="
            f"{recipe.ib_mbm_out_dim}; make them equal or set feat_kd_alpha=0",
        )
    _require(
        not (recipe.use_teacher_finetuning and recipe.train_distill_adapter_only),
        "use_teacher_finetuning and train_distill_adapter_only exclude each other; keep one",
    )


def check_gate(threshold: float, num_classes: int) -> str | None:
    """UserError for a gate below chance (SPEC 4); a warning text for one below 1.5 times chance."""
    key = f"enable_kd_after_syn_acc={threshold:g}"
    _require(
        threshold >= 1 / num_classes,
        f"{key} is below chance for {num_classes} classes (1/{num_classes}); set --config.enable_kd_after_syn_acc="
        f"{told_by_data.gate(num_classes):.2g}, which it is where it is left empty",
    )
    if threshold < 1.5 / num_classes:
        return f"{key} is less than 1.5 times chance ({1 / num_classes:g}): the gate will open almost at once"
    return None
