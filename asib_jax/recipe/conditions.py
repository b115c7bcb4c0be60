"""When keys act, where several do so together or it takes more words than the key's own line has room for."""

from asib_jax.recipe.keys import When

STUDENT = When("a student", lambda recipe: not recipe.teachers_only)
TEACHERS = When("teachers", lambda recipe: recipe.uses_teachers)
FUSION = When("fusion", lambda recipe: recipe.uses_fusion)
FOLDS = TEACHERS & When("`teacher_folds`", lambda recipe: recipe.teacher_folds > 0)
HOLDOUT = When("`teacher_holdout`", lambda recipe: recipe.teacher_holdout > 0)
KD = When("`kd_alpha`", lambda recipe: recipe.kd_alpha > 0)
SYNERGY = When("`kd_target='synergy'`", lambda recipe: recipe.kd_target == "synergy")
ADAPTERS = When("fusion, `use_distillation_adapter`", lambda recipe: recipe.uses_adapters)
FINETUNING = When("`use_teacher_finetuning`", lambda recipe: recipe.use_teacher_finetuning)
BOTTLENECK = FUSION & When("`use_ib`", lambda recipe: recipe.use_ib)
IB_BETA = BOTTLENECK & When("no `beta_schedule`", lambda recipe: not recipe.beta_schedule)
CCCP = When("`use_cccp`", lambda recipe: recipe.use_cccp)
TUNED = FUSION & When(
    "`use_teacher_finetuning` or `train_distill_adapter_only`",
    lambda recipe: recipe.use_teacher_finetuning or recipe.train_distill_adapter_only,
)
DISAGREEMENT = STUDENT & When("`use_disagree_weight`", lambda recipe: recipe.use_disagree_weight)
LAMBDAS_DIFFER = When(
    "different `disagree_lambda_`", lambda recipe: recipe.disagree_lambda_high != recipe.disagree_lambda_low
)

# Of a teacher's own keys: the conditions take the teacher, too.
GIVEN = When("`weights`", lambda teacher, recipe: bool(teacher.weights))
FROM_SCRATCH = When("`train_epochs`", lambda teacher, recipe: teacher.train_epochs > 0)
FINETUNED = When("`finetune_epochs`", lambda teacher, recipe: teacher.finetune_epochs > 0)
TRAINED_FIRST = When("`train_epochs` or `finetune_epochs`", lambda teacher, recipe: teacher.epochs > 0)
TRAINED_IN_A = When("`use_teacher_finetuning`", lambda teacher, recipe: recipe.trains_teachers)
