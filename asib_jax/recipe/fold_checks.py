"""What folds and hold-outs of the teachers' images ask of a recipe, so that no network is asked what it has seen."""

from asib_jax.errors import UserError
from asib_jax.recipe.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Raise UserError, naming the keys, for a recipe under which some output would come from a network that saw the
    image, or whose keys contradict each other."""
    for wrong, message in _rules(recipe):
        if wrong:
            raise UserError(message)
    if recipe.uses_teachers and (recipe.teacher_folds or recipe.teacher_holdout):
        _check_weights(recipe)
    if recipe.folds and not recipe.teachers_only:
        _check_stored(recipe)


def _rules(recipe: Recipe) -> list[tuple[bool, str]]:
    folds, holdout = recipe.teacher_folds, recipe.teacher_holdout
    return [
        (folds == 1, "teacher_folds=1 leaves no image to train on: give 2 or more, or 0 for none"),
        (
            folds > 0 and holdout > 0,
            f"teacher_folds={folds} and teacher_holdout={holdout:g} are both set; set one of them to 0",
        ),
        (
            recipe.student_images == "holdout" and not holdout,
            "student_images='holdout' needs teacher_holdout, the share that teachers are trained without; set it, or "
            "student_images='all'",
        ),
        (
            recipe.folds > 0 and recipe.teacher_deploy == "all" and recipe.uses_fusion,
            "teacher_deploy='all' measures a teacher whose features the fusion network has never been fitted to; set "
            "teacher_deploy='copies', or distil without fusion (kd_target='avg', feat_kd_alpha=0)",
        ),
        (
            recipe.trains_teachers and (recipe.folds > 0 or holdout > 0),
            f"use_teacher_finetuning trains teachers on the images that {_named(recipe)} keeps from them; set it to "
            "False, or teacher_folds and teacher_holdout to 0",
        ),
    ]


def _named(recipe: Recipe) -> str:
    return f"teacher_folds={recipe.folds}" if recipe.folds else f"teacher_holdout={recipe.teacher_holdout:g}"


def _check_weights(recipe: Recipe) -> None:
    for k, teacher in enumerate(recipe.teachers, 1):
        given = f"teacher{k}.weights={teacher.weights!r}"
        if not teacher.epochs:
            raise UserError(
                f"{_named(recipe)} is of teachers that are trained here, but {given} are used as they are: what they "
                f"were fitted on is not known. Train teacher{k} (weights='' and train_epochs), fine-tune it "
                f"(teacher{k}.finetune_epochs and saw_val=False), or set teacher_folds and teacher_holdout to 0"
            )
        if teacher.weights and teacher.saw_val:
            raise UserError(
                f"{_named(recipe)}, but teacher{k}.saw_val=True: {given} were fitted on these images, so that every "
                f"copy has seen all of them; set teacher{k}.saw_val=False where that is not so, or train teacher{k} "
                "from scratch"
            )


def _check_stored(recipe: Recipe) -> None:
    """Which copy an image is asked of is known where outputs are stored."""
    reads = recipe.reads_teachers_in_b
    reasons = {
        "a_step_views=0": (recipe.uses_fusion and not recipe.a_step_views, "--config.a_step_views=4"),
        "b_step_views=0": (reads and not recipe.b_step_views, "--config.b_step_views=20"),
        "mixup_alpha or cutmix_alpha_distill": (reads and recipe.mixes, "both to 0"),
    }
    for what, (found, instead) in reasons.items():
        if found:
            raise UserError(
                f"teacher_folds={recipe.folds} with {what}: which copy to ask of an image is known where the teachers' "
                f"outputs are stored, but these would be run at every step; set {instead}, or teacher_folds=0 "
                "(teacher_holdout needs nothing stored)"
            )
