"""Reading a config into a recipe, and what is let through; what is not: test_bad_input.py."""

import copy
import dataclasses
import re

import pytest
from ml_collections import ConfigDict

from asib_jax import build, models, recipe
from asib_jax.objectives import losses, targets
from asib_jax.recipe import checks, keys, reading, told_by_data
from configs import base, ce_only, l0_baseline, l1_ib, l4_full


def changed(config: ConfigDict, changes: dict) -> dict:
    """The config as nested plain dicts, with the leaves under these dotted keys set to any value."""
    tree = config.to_dict()
    for key, value in changes.items():
        *groups, leaf = key.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[leaf] = value
    return tree


A_FILE = __file__  # weights are read later: here the file must only exist
STEADY = {  # what the cases below rely on, whatever the profile says
    "synergy_base": "none",
    "ib_mbm_kv": "feat",
    "dataset.batch_size": 32,
    "student_epochs_per_stage": (10, 10),
    "teacher_adapt_epochs": 8,
    "schedule.lr_warmup_epochs": 2,
    "teacher1.train_epochs": 40,
    "teacher2.train_epochs": 40,
    "a_step_views": 0,
    "b_step_views": 0,
    "distill_out_dim": 64,
    "ib_mbm_out_dim": 64,
}


def recipe_of(changes: dict) -> recipe.Recipe:
    """`configs/l4_full.py:digits`, steadied and changed."""
    return recipe.read(changed(l4_full.get_config("digits"), STEADY | changes))


def test_values_arrive_unchanged():
    read = recipe.read(base.get_config())
    assert (read.seed, read.tau, read.kd_target, read.use_amp) == (0, 4.0, "synergy", True)
    assert read.tau_schedule == (2.0, 6.0) and read.beta_schedule == ()
    assert read.teacher_lr is None and read.teacher_adapt_alpha_kd is None
    assert read.dataset.name == "cifar100" and read.schedule.min_lr == 1e-5
    assert [teacher.name for teacher in read.teachers] == ["convnext_l", "resnet152"]
    assert read.teachers[0].mean == (0.485, 0.456, 0.406) and read.model.student.mean == ()  # the data tell it


@pytest.mark.parametrize(
    "key, value, field",
    [
        ("tau", 3, 3.0),
        ("tau_schedule", (2, 6), (2.0, 6.0)),
        ("tau_schedule", [2.0, 6.0], (2.0, 6.0)),
        ("student_epochs_per_stage", 7, (7,)),
        ("student_freeze_level", 0, (0,)),
        ("beta_schedule", (), ()),
        ("teacher_lr", 1, 1.0),
        ("teacher_lr", None, None),
    ],
)
def test_coercion(key, value, field):
    """An int serves as a float, one number as a tuple of one, a list as a tuple; None only where it means something."""
    result = getattr(recipe_of({key: value}), key)
    assert result == field and type(result) is type(field)
    if isinstance(field, tuple):
        assert [type(item) for item in result] == [type(item) for item in field]


@pytest.mark.parametrize(
    "key, value, needed",
    [
        ("seed", 1.0, "int"),
        ("seed", True, "int"),
        ("seed", "0", "int"),
        ("seed", None, "int"),
        ("tau", "4", "float"),
        ("tau", True, "float"),
        ("tau", (4.0,), "float"),
        ("use_ib", 1, "bool"),
        ("use_ib", "False", "bool"),
        ("kd_target", 3, "str"),
        ("kd_target", None, "str"),
        ("tau_schedule", "2,6", "float"),
        ("student_epochs_per_stage", (20, 1.5), "int"),
        ("student_epochs_per_stage", None, "int"),
        ("teacher_lr", "1e-4", "float"),
        ("dataset.batch_size", 64.0, "int"),
        ("schedule.milestones", (True,), "int"),
        ("model.student.mean", ("a",), "float"),
        ("teacher2.freeze_bn", 0, "bool"),
        ("teacher1.name", 56, "str"),
    ],
)
def test_wrong_types(key, value, needed):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=.* {needed} is needed$"):
        recipe_of({key: value})


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("kd_alhpa", "kd_alpha"),
        ("synergy_only_epoch", "synergy_only_epochs"),
        ("dataset.batchsize", "dataset.batch_size"),
        ("model.student.weight", "model.student.weights"),
        ("schedule.minlr", "schedule.min_lr"),
        ("teacher2.freez_level", "teacher2.freeze_level"),
        ("teacher1_freeze_bn", "student_freeze_bn"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=rf"^unknown key {re.escape(key)}; did you mean {re.escape(nearest)}\?$"):
        recipe_of({key: 0})


def test_groups():
    with pytest.raises(ValueError, match="^unknown key teachers; teachers are the groups teacher1, teacher2, ...$"):
        recipe_of({"teachers": ()})
    with pytest.raises(ValueError, match="^dataset=3 is a int; a group of keys is needed$"):
        recipe_of({"dataset": 3})


def test_an_unknown_key_near_to_nothing():
    with pytest.raises(ValueError, match="^unknown key channels_last$"):
        recipe_of({"channels_last": True})


@pytest.mark.parametrize("group, key", [("", "tau"), ("dataset", "name"), ("schedule", "gamma"), ("teacher2", "std")])
def test_missing_keys_are_named(group, key):
    tree = l1_ib.get_config().to_dict()
    del (tree[group] if group else tree)[key]
    with pytest.raises(ValueError, match=f"^missing keys: {'.'.join(filter(None, (group, key)))}$"):
        recipe.read(tree)


@pytest.mark.parametrize("renamed", ["teacher3", "teacher0", "teacher01"])
def test_teachers_without_a_gap(renamed):
    tree = l1_ib.get_config().to_dict()
    tree[renamed] = tree.pop("teacher2")
    with pytest.raises(ValueError, match=f"teacher1, teacher2, ... without a gap; found .*'{renamed}'"):
        recipe.read(tree)


def test_any_number_of_teachers_in_order():
    config = l1_ib.get_config("digits")
    with config.unlocked():
        for k in range(3, 12):
            config[f"teacher{k}"] = ConfigDict(config.teacher2)
            config[f"teacher{k}"].train_epochs = k
    read = recipe.read(config)
    assert [teacher.train_epochs for teacher in read.teachers[2:]] == list(range(3, 12))  # 10 and 11 after 9
    checks.check(read)


def test_what_follows_from_the_values():
    l4, l0, alone = (recipe.read(module.get_config("digits")) for module in (l4_full, l0_baseline, ce_only))
    assert (l4.uses_fusion, l4.uses_teachers, l4.uses_adapters) == (True, True, True)
    assert (l0.uses_fusion, l0.uses_teachers, l0.uses_adapters) == (False, True, False)
    assert (l4.student_feature, l0.student_feature) == ("distill_feat", "feat_2d")
    assert (alone.uses_fusion, alone.uses_teachers) == (False, False)
    assert recipe_of({"feat_kd_key": "feat_2d"}).student_feature == "feat_2d"
    assert recipe_of({"use_distillation_adapter": False}).student_feature == "feat_2d"
    more = {"cccp_nt": 3, "cccp_ns": 2, "student_epochs_per_stage": (5, 4), "teacher_adapt_epochs": 6}
    with_cccp, without = recipe_of(more), recipe_of({**more, "use_cccp": False})
    assert (with_cccp.a_epochs, with_cccp.b_epochs) == (18, (10, 8))
    assert (without.a_epochs, without.b_epochs) == (6, (5, 4))
    assert recipe_of({"use_amp": True}).compute_dtype == "bfloat16" and l4.compute_dtype == "float32"


@pytest.mark.parametrize("target, width", [("synergy", 64), ("avg", 0)])
def test_an_adapter_is_built_only_where_a_step_trains_it(target, width):
    """Whatever the key asks for: without a fusion network it has no effect, which its warning says."""
    asked = recipe_of({"feat_kd_key": "distill_feat", "kd_target": target})
    assert build.build_networks(asked, 10).student.adapter_dim == width
    assert ("feat_kd_key" in keys.idle(asked)) == (target == "avg")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_stages": 2},
        {"num_devices": 1, "dataset.batch_size": 30},
        {"schedule.lr_warmup_epochs": 16},
        {"ce_alpha": 0.0},
        {"kd_alpha": 0.0},
        {"kd_target": "teacher", "kd_teacher_index": 1},
        {"feat_kd_alpha": 1.0},
        {"feat_kd_alpha": 1.0, "ib_mbm_out_dim": 32, "feat_kd_key": "feat_2d"},
        {"model.student.name": "resnet8_pretrain", "model.student.weights": A_FILE},
        {"model.student.name": "resnet8"},
        {"teacher1.weights": A_FILE, "teacher1.train_epochs": 0},
        {"kd_max_ratio": 0.0},
    ],
)
def test_what_is_no_contradiction(changes):
    checks.check(recipe_of(changes))


def test_synergy_needs_two_teachers_and_the_average_one():
    synergy, average = l1_ib.get_config("digits").to_dict(), l0_baseline.get_config("digits").to_dict()
    del synergy["teacher2"], average["teacher2"]
    checks.check(recipe.read(average))
    with pytest.raises(ValueError, match="1 teachers configured; synergy .* add teacher2"):
        checks.check(recipe.read(synergy))
    del average["teacher1"]
    with pytest.raises(ValueError, match="0 teachers configured.* add teacher1"):
        checks.check(recipe.read(average))
    checks.check(recipe.read({**average, "ce_alpha": 1.0, "kd_alpha": 0.0}))


def test_an_unknown_backbone_names_all_that_are_known():
    with pytest.raises(ValueError, match="^unknown model 'resnet57'; teacher1.name must be one of ") as caught:
        checks.check(recipe_of({"teacher1.name": "resnet57"}))
    assert all(name in str(caught.value) for name in models.MODELS)


def test_the_student_alone_needs_no_teacher_of_the_config():
    checks.check(recipe.read(ce_only.get_config("small")))  # although its teachers have no weights


@pytest.mark.parametrize(
    "threshold, classes, warns",
    [(0.01, 100, True), (0.0149, 100, True), (0.015, 100, False), (0.1, 10, True), (0.3, 10, False), (0.5, 2, True)],
)
def test_gate(threshold, classes, warns):
    """An error below chance, a warning below 1.5 times chance."""
    warning = checks.check_gate(threshold, classes)
    assert (warning is not None) == warns
    if warns:
        assert f"enable_kd_after_syn_acc={threshold:g}" in warning
    with pytest.raises(ValueError, match=f"enable_kd_after_syn_acc=.* is below chance for {classes} classes"):
        checks.check_gate(0.99 / classes, classes)


def test_a_stored_configuration_may_be_of_another_version():
    """Keys that came later have their defaults, retired ones are left out; a user's own has to be whole."""
    now = changed(l4_full.get_config("digits"), {"tau": 3.0})
    then = copy.deepcopy(now) | {"scale_lr_with_devices": True, "bank_memory_gb": 3.0}
    del then["min_cw"], then["model"]["student"]["weights_sha256"], then["teacher2"]["saw_val"]
    assert recipe.read_stored(then) == recipe.read_stored(now) == recipe.read(now)
    with pytest.raises(ValueError, match="^unknown key scale_lr_with_devices"):
        recipe.read(now | {"scale_lr_with_devices": True})
    with pytest.raises(ValueError, match="^unknown key a_key_of_tomorrow"):
        recipe.read_stored(then | {"a_key_of_tomorrow": 1})


def test_stored_runs_of_earlier_versions_added_synergy_to_nothing():
    """Where there was synergy: a run without it is the same today."""
    for config, expected in ((l1_ib, ("none", "feat")), (l0_baseline, ("", ""))):
        then = changed(config.get_config("digits"), {})
        del then["synergy_base"], then["ib_mbm_kv"]
        read = recipe.read_stored(then)
        assert (read.synergy_base, read.ib_mbm_kv) == expected
    then["synergy_base"] = "mixture"
    assert recipe.read_stored(then).base == "mixture"


@pytest.mark.parametrize(
    "changes, added_to, kv",
    [
        ({"synergy_base": "", "ib_mbm_kv": ""}, "avg", "feat"),
        ({"synergy_base": "", "ib_mbm_kv": "", "teacher2.classes": "0-4"}, "mixture", "feat_prob"),
        ({"synergy_base": "avg", "ib_mbm_kv": "", "teacher2.classes": "0-4"}, "avg", "feat_prob"),
        ({"synergy_base": "", "ib_mbm_kv": "feat", "teacher2.classes": "0-4"}, "mixture", "feat"),
        ({"teacher2.classes": "0-4"}, "none", "feat"),
        ({"synergy_base": "", "ib_mbm_kv": "", "specialists.overlap": 20.0}, "mixture", "feat_prob"),
    ],
)
def test_what_synergy_is_added_to_is_told_by_the_teachers(changes, added_to, kv):
    """And the networks are built so."""
    read = told_by_data.complete(recipe_of(changes), 10, lambda: None)
    assert (read.base, read.kv) == (added_to, kv)
    nets = build.build_networks(read, 10)
    assert nets.synergy_head.base == added_to
    assert {teacher.joins_probabilities for teacher in nets.teachers} == {kv == "feat_prob"}


# --- the table -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PatientTeacher(recipe.TeacherRecipe):
    patience: tuple[float, ...] = keys.key(
        (1.0,),
        "how long it waits",
        above=0,
        below=5,
        lengths=(0, 1),
        when=keys.When("`freeze_bn`", lambda teacher, recipe: teacher.freeze_bn and recipe.use_ib),
    )


@dataclasses.dataclass(frozen=True)
class Lunar(recipe.Recipe):
    """A recipe with two more keys, of which nothing but these lines knows."""

    teachers: tuple[PatientTeacher, ...] = keys.key((PatientTeacher(), PatientTeacher(freeze_bn=False)), "those")
    moon: str = keys.key(
        "full",
        "what the moon does",
        choices=("full", "new"),
        free=True,
        when=keys.When("`use_ib`", lambda recipe: recipe.use_ib),
    )


def test_a_key_is_declared_once():
    """Its values, range, choices, idleness, freedom and documentation follow."""
    lunar = Lunar(use_ib=True)
    assert keys.flat(lunar)["moon"] == "full" and keys.flat(lunar)["teacher2.patience"] == (1.0,)
    read = reading.read_group(Lunar, {"moon": "new", "teachers": ()}, "", complete=False)
    assert (read.moon, read.tau) == ("new", 4.0)
    with pytest.raises(ValueError, match="^unknown key mon; did you mean moon"):
        reading.read_group(Lunar, {"mon": "new"}, "", complete=False)

    keys.check(lunar)
    late, two = (Lunar(teachers=(PatientTeacher(patience=given),)) for given in ((5.0,), (1.0, 2.0)))
    for wrong, told in (
        (Lunar(moon="half"), "moon='half'; valid: 'full', 'new'"),
        (late, "teacher1.patience=(5.0,) must be in (0, 5)"),
        (two, "teacher1.patience=(1.0, 2.0) needs 1 entries"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
            keys.check(wrong)

    def idle(of):
        return keys.idle(of) & {"moon", "teacher1.patience", "teacher2.patience"}

    assert idle(lunar) == {"teacher2.patience"}
    assert idle(Lunar()) == {"moon", "teacher1.patience", "teacher2.patience"}
    assert keys.without_effect(Lunar(moon="new"), Lunar()) == ["moon"]
    assert "moon" not in keys.that_matter(lunar) and "teacher1.patience" in keys.that_matter(lunar)
    table = keys.table(Lunar()).splitlines()
    assert "| `moon` | `'full'` | what the moon does | `'full'`, `'new'` | `use_ib` | free |" in table
    assert "| `teacherK.patience` | `(1.0,)` | how long it waits | 1 or none, in (0, 5) | `freeze_bn` | |" in table


@pytest.mark.parametrize(
    "options, words, inside, outside",
    [
        ({"at_least": 2}, "at least 2", (2, 3.5), (1, -7)),
        ({"above": 0}, "positive", (1e-9, 5), (0, -1)),
        ({"above": 1.5}, "above 1.5", (2,), (1.5,)),
        ({"at_least": 0, "below": 1}, "in [0, 1)", (0, 0.9), (1, -0.1)),
        ({"above": 0, "at_most": 1}, "in (0, 1]", (0.1, 1), (0, 1.1)),
        ({}, "", (-5, 0.0), (2**31, float("nan"))),
    ],
)
def test_ranges(options, words, inside, outside):
    told = keys.Key("", **options)
    assert told.range() == words
    for number in inside:
        told.check("k", number)
        told.check("k", (inside[0], number))
    for number in outside:
        with pytest.raises(ValueError, match=f"^k={re.escape(str(number))} must be "):
            told.check("k", number)
        with pytest.raises(ValueError, match="^k=.* must be "):
            told.check("k", (inside[0], number))


def test_every_default_is_allowed_and_described():
    keys.check(recipe.Recipe())
    for held in keys.walk(recipe.Recipe()):
        assert 0 < len(held.key.meaning) <= 200, held.name


FUSION_KEYS = ["train_distill_adapter_only", "use_cccp", "use_ib"]  # of the config; idle where nothing distils so


@pytest.mark.parametrize(
    "changes, idle",
    [
        ({}, []),
        ({"beta_schedule": (0.0, 1e-4, 3), "ib_beta": 1e-3}, ["ib_beta"]),
        ({"tau_schedule": (), "tau_decay_power": 2.0}, ["tau_decay_power"]),
        ({"use_cccp": False, "tau": 2.0}, ["tau"]),
        ({"use_cccp": False, "tau": 2.0, "tau_schedule": ()}, []),
        ({"kd_ens_alpha": 0.5}, ["kd_ens_alpha"]),
        ({"kd_ens_alpha": 0.5, "teacher_adapt_kd_warmup": 2}, []),
        ({"schedule.gamma": 0.5, "schedule.milestones": (5,)}, ["schedule.gamma", "schedule.milestones"]),
        ({"schedule.gamma": 0.5, "schedule.milestones": (5,), "schedule.type": "multistep"}, []),
        ({"use_disagree_weight": True}, ["use_disagree_weight"]),
        ({"use_disagree_weight": True, "disagree_lambda_high": 2.0}, []),
        ({"seed": 3, "tau": 2.0, "ib_beta": 1e-3, "cccp_alpha": 0.5}, []),
        ({"use_ib": False, "ib_beta": 1e-3, "min_cw": 0.5}, ["ib_beta", "min_cw"]),
        ({"use_cccp": False, "cccp_alpha": 0.5, "cccp_nt": 2}, ["cccp_alpha", "cccp_nt"]),
        ({"use_partial_freeze": False}, ["student_freeze_level"]),
        ({"disagree_mode": "any_wrong", "loss_clamp_max": 5.0}, ["disagree_mode", "loss_clamp_max"]),
        ({"momentum": 0.5}, ["momentum"]),
        ({"synergy_base": "avg", "ib_mbm_kv": "feat_prob", "ib_mbm_teacher_dropout": 0.1}, []),
        (
            {"kd_target": "avg", "synergy_base": "avg", "ib_mbm_kv": "feat_prob", "ib_mbm_teacher_dropout": 0.1},
            sorted(["ib_mbm_kv", "ib_mbm_teacher_dropout", "synergy_base", *FUSION_KEYS]),
        ),
        ({"momentum": 0.5, "optimizer": "sgd"}, []),
        ({"amp_dtype": "float32"}, ["amp_dtype"]),
        (
            {
                "teachers_only": True,
                "tau": 2.0,
                "dataset.train_subset": 50,
                "dataset.batch_size": 16,
                "seed": 3,
                "compilation_cache": "",
            },
            [
                "dataset.train_subset",
                "student_freeze_level",
                "tau",
                "train_distill_adapter_only",
                "use_cccp",
                "use_ib",
                "use_partial_freeze",
            ],
        ),
        (
            {"kd_alpha": 0.0, "ce_alpha": 1.0, "teacher1.train_lr": 0.1, "a_step_views": 3, "b_step_views": 3},
            ["a_step_views", "teacher1.train_lr", *FUSION_KEYS],
        ),
        ({"teacher1.saw_val": False, "teacher1.freeze_bn": False}, ["teacher1.freeze_bn", "teacher1.saw_val"]),
        (
            {"teacher1.finetune_lr": 1e-3, "teacher2.early_stopping_min_delta": 0.1, "teacher2.label_smoothing": 0.1},
            ["teacher1.finetune_lr", "teacher2.early_stopping_min_delta"],
        ),
        (
            {"kd_alpha": 0.0, "ce_alpha": 1.0, "kd_student_share": 0.3, "kd_student_share_end": 0.1},
            ["kd_student_share", "kd_student_share_end", *FUSION_KEYS],
        ),
        ({"student_epochs_per_stage": (1,), "kd_student_share_end": 0.1}, ["kd_student_share_end"]),
        ({"kd_teacher_index": 1}, ["kd_teacher_index"]),
        ({"kd_teacher_index": 1, "kd_target": "teacher"}, FUSION_KEYS),
        ({"kd_target": "avg", "kd_ens_alpha": 0.5}, ["kd_ens_alpha", *FUSION_KEYS]),
        ({"train_distill_adapter_only": False, "teacher_lr": 1e-5, "reg_lambda": 0.1}, ["reg_lambda", "teacher_lr"]),
        (
            {"kd_target": "avg", "teacher_adapt_epochs": 0, "ib_mbm_out_dim": 32, "synergy_kd_alpha": 0.0},
            ["ib_mbm_out_dim", "synergy_kd_alpha", "train_distill_adapter_only", "use_cccp", "use_ib"],
        ),
        ({"kd_target": "avg", "teacher_adapt_epochs": 0, "cccp_ns": 2}, ["train_distill_adapter_only", "use_ib"]),
    ],
)
def test_without_effect(changes, idle):
    defaults = recipe.read(changed(base.get_config("digits"), STEADY))
    assert keys.without_effect(recipe_of(changes), defaults) == idle


def test_the_choices_are_those_of_the_code():
    for target in targets.KD_TARGETS:
        checks.check(recipe_of({"kd_target": target}))
    for mode in losses.DISAGREE_MODES:
        checks.check(recipe_of({"disagree_mode": mode}))
