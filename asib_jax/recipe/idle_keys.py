"""Which keys of a recipe have no effect in its run."""
import dataclasses
import math

from asib_jax.recipe.recipe import Recipe
from asib_jax.recipe.typed_groups import flat

# Keys that act only where a condition on the recipe holds.
_ACTIVE = (
    (lambda r: r.use_ib and not r.beta_schedule, ("ib_beta", "ib_beta_warmup_epochs")),
    (lambda r: r.use_ib, ("beta_schedule", "ib_mbm_logvar_clip", "ib_mbm_min_std", "min_cw")),
    (lambda r: r.use_cccp, ("cccp_alpha", "cccp_nt", "cccp_ns")),
    (lambda r: r.uses_fusion or r.cccp_ns > 1, ("use_cccp",)),
    (lambda r: bool(r.tau_schedule), ("tau_decay_power",)),
    (lambda r: not r.tau_schedule or r.use_cccp, ("tau",)),
    (lambda r: r.teacher_adapt_kd_warmup > 0, ("kd_ens_alpha",)),
    (lambda r: r.kd_ens_alpha > 0, ("teacher_adapt_kd_warmup",)),
    (lambda r: r.schedule.type == "cosine", ("schedule.min_lr",)),
    (lambda r: r.schedule.type == "step", ("schedule.step_size",)),
    (lambda r: r.schedule.type == "multistep", ("schedule.milestones",)),
    (lambda r: r.schedule.type != "cosine", ("schedule.gamma",)),
    (lambda r: r.use_disagree_weight, ("disagree_mode", "disagree_lambda_high", "disagree_lambda_low")),
    (lambda r: r.disagree_lambda_high != r.disagree_lambda_low, ("use_disagree_weight", "disagree_mode")),
    (lambda r: r.use_loss_clamp, ("loss_clamp_max",)),
    (lambda r: r.use_partial_freeze, ("student_freeze_level",)),
    (lambda r: r.kd_target == "teacher", ("kd_teacher_index",)),
    (lambda r: r.kd_target == "synergy", ("kd_ens_alpha", "teacher_adapt_kd_warmup")),
    (lambda r: r.optimizer == "sgd", ("momentum",)),
    (lambda r: r.use_amp, ("amp_dtype",)),
    (lambda r: r.use_teacher_finetuning or r.train_distill_adapter_only, ("teacher_lr", "reg_lambda")),
    (lambda r: r.kd_alpha > 0, ("kd_target", "kd_max_ratio", "kd_warmup_epochs", "use_disagree_weight")),
    (lambda r: r.uses_adapters, ("distill_out_dim", "distill_hidden_dim", "train_distill_adapter_only")),
    (lambda r: not r.trains_teachers and ((r.uses_fusion and r.a_step_views > 0) or (
        r.reads_teachers_in_b and r.b_step_views > 0 and not r.mixes)), ("bank_memory_gb",)),
    (lambda r: r.uses_teachers and not r.trains_teachers, ("teacher_cache",)),
    (lambda r: r.uses_fusion, (
        "a_step_views", "use_ib", "cccp_alpha", "cccp_nt", "use_distillation_adapter", "use_teacher_finetuning",
        "feat_kd_key",
        "synergy_only_epochs", "enable_kd_after_syn_acc", "synergy_ce_alpha", "synergy_kd_alpha",
        "synergy_ema_alpha", "label_smoothing", "teacher_adapt_alpha_kd", "a_step_lr", "ib_mbm_lr_factor",
        "a_step_weight_decay", "ib_mbm_out_dim", "ib_mbm_n_head", "ib_mbm_feature_norm", "ib_mbm_residual",
        "ib_mbm_reg_lambda", "synergy_head_dropout", "synergy_temp_learnable")),
    (lambda r: r.uses_teachers, ("tau", "tau_schedule", "train_control")),
    (lambda r: r.uses_fusion or not r.teacher_adapt_epochs, ("teacher_adapt_epochs",)),
)
# The same of a teacher's own keys; conditions on the teacher and the recipe.
_TEACHER_ACTIVE = (
    (lambda t, r: bool(t.weights), ("saw_val", "weights_sha256")),
    (lambda t, r: t.train_epochs > 0, ("train_lr", "train_weight_decay")),
    (lambda t, r: t.finetune_epochs > 0, ("finetune_lr", "finetune_weight_decay", "finetune_freeze_level")),
    (lambda t, r: t.epochs > 0, ("warmup_epochs", "label_smoothing", "finetune_use_cutmix",
                                 "early_stopping_patience")),
    (lambda t, r: t.epochs > 0 and t.finetune_use_cutmix, ("finetune_cutmix_alpha",)),
    (lambda t, r: t.epochs > 0 and t.early_stopping_patience > 0, ("early_stopping_min_delta",)),
    (lambda t, r: r.trains_teachers and r.use_partial_freeze, ("freeze_level",)),
    (lambda t, r: r.trains_teachers, ("freeze_bn",)),
)
# With teachers_only nothing else acts.
_ACTIVE_FOR_TEACHERS = {"seed", "results_dir", "exp_id", "num_devices", "scale_lr_with_devices",
                        "steps_per_call", "device_data_gb", "use_amp", "amp_dtype", "tensorboard", "wandb",
                        "compilation_cache", "resume", "checkpoint_minutes", "checkpoint_steps",
                        "max_nonfinite_steps", "deterministic", "platform", "dataset", "teachers",
                        "teacher_cache", "teachers_only", "grad_clip_norm", "schedule"}


def inactive(recipe: Recipe) -> set[str]:
    """Every key, e.g. "tau" or "teacher1.train_lr", that no code acts on under this recipe."""
    idle = {key for active, keys in _ACTIVE if not active(recipe) for key in keys}
    if recipe.teachers_only:
        idle |= {field.name for field in dataclasses.fields(recipe)} - _ACTIVE_FOR_TEACHERS
        idle |= {"dataset.train_subset", "schedule.lr_warmup_epochs"}
    for k, teacher in enumerate(recipe.teachers, 1):
        names = {key for active, keys in _TEACHER_ACTIVE if not active(teacher, recipe) for key in keys}
        if not recipe.uses_teachers:
            names = {field.name for field in dataclasses.fields(teacher)}
        idle |= {f"teacher{k}.{name}" for name in names}
    return idle


def without_effect(recipe: Recipe, defaults: Recipe) -> list[str]:
    """Keys set away from `defaults` that have no effect in this run, sorted; a teacher's where both have it."""
    def same(a, b):
        return a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b))

    def is_idle(key):
        return key in idle or any(key.startswith(f"{group}.") for group in idle)

    idle, ours, theirs = inactive(recipe), flat(recipe), flat(defaults)
    return sorted(key for key in ours if key in theirs and is_idle(key) and not same(ours[key], theirs[key]))
