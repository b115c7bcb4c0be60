"""The configs: readable under every profile, an ablation ladder that changes what it says, defaults that stay put."""

import importlib
import json
import pathlib
import re

import key_table
import pytest
from ml_collections import ConfigDict

from asib_jax import recipe
from asib_jax.data.statistics import Statistics
from asib_jax.recipe import checks, keys, told_by_data
from asib_jax.weights import teacher_store
from configs import base

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROFILES = ("", "small", "digits", "own")
# Child: parent, and everything that differs; BASE is the value of base.py under the same profile.
BASE = object()
ORIGINAL = {"synergy_base": "none", "ib_mbm_kv": "feat"}
LADDER = {
    "ce_only": ("base", {"ce_alpha": 1.0, "kd_alpha": 0.0, "teacher_adapt_epochs": 0}),
    "l0_baseline": ("base", {"kd_target": "avg", "teacher_adapt_epochs": 0}),
    "side_fusion": ("l0_baseline", {"kd_target": "synergy", "teacher_adapt_epochs": BASE, **ORIGINAL}),
    "l1_ib": ("side_fusion", {"use_ib": True}),
    "l1_avg": ("l1_ib", {"synergy_base": "avg"}),
    "l1_mixture": ("l1_ib", {"synergy_base": "mixture"}),
    "l2_cccp": ("l1_ib", {"use_cccp": True}),
    "l3_tadapt": ("l2_cccp", {"train_distill_adapter_only": True}),
    "l4_full": ("l3_tadapt", {"use_partial_freeze": True, "student_freeze_level": (-1, 2)}),
    "side_cccp_ppf": ("side_fusion", {"use_cccp": True, "use_partial_freeze": True, "student_freeze_level": (-1, 2)}),
}
FINETUNE = {
    f"finetune_{name}_{data}": (name, data)
    for data in ("cifar100", "imagenet32")
    for name in ("convnext_s", "convnext_l", "efficientnet_l2", "resnet152")
}
# What every rung shares, and the other defaults of the method.
COMMON = {
    "ce_alpha": 0.65,
    "kd_alpha": 0.35,
    "kd_max_ratio": 2.0,
    "tau_schedule": (2.0, 6.0),
    "a_step_lr": 1e-4,
    "ib_mbm_out_dim": 512,
    "ib_mbm_logvar_clip": 6.0,
    "ib_mbm_min_std": 1e-3,
    "ib_mbm_lr_factor": 10.0,
    "ib_beta": 5e-5,
    "ib_beta_warmup_epochs": 8,
    "synergy_kd_alpha": 1.0,
    "use_distillation_adapter": True,
    "distill_out_dim": 512,
    "feat_kd_alpha": 0.0,
    "optimizer": "adamw",
    "student_lr": 1e-3,
    "student_weight_decay": 3e-4,
    "grad_clip_norm": 0.5,
    "schedule.type": "cosine",
    "schedule.lr_warmup_epochs": 5,
    "student_epochs_per_stage": (20, 20),
    "teacher_adapt_epochs": 12,
    "synergy_only_epochs": 6,
    "use_amp": True,
    "amp_dtype": "bfloat16",
    "dataset.batch_size": 64,
    "teacher1.name": "convnext_l",
    "teacher2.name": "resnet152",
    "model.student.name": "resnet101_scratch",
    "dataset.name": "",
}
OTHERS = {
    "tau": 4.0,
    "cccp_alpha": 0.25,
    "cccp_nt": 1,
    "cccp_ns": 1,
    "synergy_ce_alpha": 0.6,
    "min_cw": 0.1,
    "ib_mbm_n_head": 4,
    "ib_mbm_feature_norm": "none",
    "disagree_lambda_high": 1.0,
    "disagree_lambda_low": 1.0,
    "reg_lambda": 0.0,
    "ib_mbm_reg_lambda": 0.0,
    "synergy_head_dropout": 0.0,
    "dataset.val_fraction": 0.1,
    "synergy_ema_alpha": 0.8,
    "tau_decay_power": 1.0,
    "loss_clamp_max": 1000.0,
    "kd_warmup_epochs": 0,
    "teacher_adapt_kd_warmup": 0,
    "schedule.min_lr": 1e-5,
    "label_smoothing": 0.0,
    "ce_label_smoothing": 0.0,
    "use_cccp": False,
    "ib_mbm_residual": True,
    "restore_best": True,
    "a_step_weight_decay": 0.0,
    "teacher1.saw_val": True,
    "teacher2.saw_val": True,
    "teacher_adapt_alpha_kd": None,
    "teacher_lr": None,
    "enable_kd_after_syn_acc": None,
    "model.student.mean": (),
    "distill_hidden_dim": 0,
    "num_stages": 0,
    "exp_id": "",
    "model.student.use_adapter": False,
}


def config_of(name: str, profile: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(profile)


def flat(config: ConfigDict, prefix: str = "") -> dict:
    """Every leaf under its dotted key."""
    leaves = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return leaves


def difference(config: ConfigDict, other: ConfigDict) -> dict:
    """The leaves of `config` whose value or presence differs in `other`."""
    ours, theirs = flat(config), flat(other)
    assert ours.keys() == theirs.keys()
    return {key: value for key, value in ours.items() if value != theirs[key]}


def test_the_table_is_the_folder():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {*LADDER, *FINETUNE, "specialists", "base", "profiles", "imagenet_teachers", "finetune", "__init__"}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["base", "specialists", *LADDER])
def test_readable(name, profile):
    config = config_of(name, profile)
    read = recipe.read(config)
    assert read == recipe.read(json.loads(json.dumps(config.to_dict())))  # as a run's folder records it
    assert len(read.teachers) == 2
    assert keys.without_effect(read, recipe.read(base.get_config(profile))) == []


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", LADDER)
def test_differs_from_its_parent_in_what_it_says(name, profile):
    parent, changes = LADDER[name]
    expected = {key: base.get_config(profile)[key] if value is BASE else value for key, value in changes.items()}
    assert difference(config_of(name, profile), config_of(parent, profile)) == expected


@pytest.mark.parametrize("profile", PROFILES)
def test_neighbours_of_the_ladder(profile):
    ce_only, l0 = config_of("ce_only", profile), config_of("l0_baseline", profile)
    assert difference(ce_only, l0) == {"ce_alpha": 1.0, "kd_alpha": 0.0, "kd_target": "synergy"}
    assert difference(config_of("side_fusion", profile), config_of("base", profile)) == ORIGINAL
    assert config_of("l2_cccp", profile).cccp_alpha == 0.25


@pytest.mark.parametrize("profile", ["digits", "own"])
@pytest.mark.parametrize("name", LADDER)
def test_profiles_that_need_no_weights_can_run(name, profile):
    checks.check(recipe.read(config_of(name, profile)))


@pytest.mark.parametrize("name", LADDER)
def test_the_small_profile_needs_two_files(name):
    config = config_of(name, "small")
    if name != "ce_only":
        with pytest.raises(ValueError, match=r"teacher1 \(resnet56\) has no weights: set teacher1.weights"):
            checks.check(recipe.read(config))
    config.teacher1.weights = config.teacher2.weights = __file__  # read later: here it must only exist
    checks.check(recipe.read(config))


@pytest.mark.parametrize("profile", PROFILES)
def test_specialists_differ_from_the_base_in_their_classes(profile):
    """Synergy's base and keys are left to the teachers; whatever the profile it lacks no weights."""
    config = config_of("specialists", profile)
    changes = {"use_ib": True, "specialists.overlap": 20.0 if profile else 0.0}
    if profile == "small":
        changes |= {
            f"teacher{k}.{key}": value for k in (1, 2) for key, value in (("name", "resnet20"), ("train_epochs", 12))
        }
    assert difference(config, config_of("base", profile)) == changes
    checks.check(recipe.read(config))
    whole = told_by_data.complete(
        recipe.read(config), 10 if profile == "digits" else 100, lambda: Statistics((0.5,), (0.2,))
    )
    told = {"digits": ["0-5", "4-9"], "": ["0-49", "50-99"]}
    assert [teacher.classes for teacher in whole.teachers] == told.get(profile, ["0-59", "40-99"])
    assert (whole.base, whole.kv) == ("mixture", "feat_prob")


@pytest.mark.parametrize("key, value", [*COMMON.items(), *OTHERS.items()])
def test_defaults(key, value):
    default = flat(base.defaults())[key]
    assert default == value and type(default) is type(value)


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_configs(name):
    """One teacher and nothing else; on ImageNet's own images validation flatters it."""
    teacher, data = FINETUNE[name]
    read = recipe.read(config_of(name))
    checks.check(read)
    assert [one.name for one in read.teachers] == [teacher] and read.dataset.name == data and read.teachers_only
    assert read.teachers[0].saw_val == (data == "imagenet32") and read.teachers[0].finetune_epochs > 0
    assert keys.without_effect(read, recipe.read(base.get_config())) == []
    with pytest.raises(ValueError, match="unknown profile 'small'"):
        config_of(name, "small")


@pytest.mark.parametrize("k, name", [(0, "convnext_l"), (1, "resnet152")])
def test_the_full_scale_ladder_takes_the_teachers_the_fine_tuning_configs_leave(k, name):
    """The same key, wherever the teacher stands. This file serves as weights: only its digest is asked for."""
    alone, ladder = config_of(f"finetune_{name}_cifar100"), config_of("l2_cccp")
    alone.teacher1.weights = ladder.teacher1.weights = ladder.teacher2.weights = __file__
    alone, ladder = recipe.read(alone), recipe.read(ladder)
    assert teacher_store.find(alone, 0).folder == teacher_store.find(ladder, k).folder
    assert teacher_store.find(alone, 0).folder != teacher_store.find(ladder, 1 - k).folder


@pytest.mark.parametrize("profile, gate, classes", [("", 0.05, 100), ("small", 0.05, 100), ("digits", 0.3, 10)])
def test_the_gate_opens_above_chance(profile, gate, classes):
    read = recipe.read(config_of("l1_ib", profile))
    assert read.gate == gate and checks.check_gate(gate, classes) is None


def test_what_profiles_leave_to_the_data():
    """At full scale how the student's images are normalised; of one's own images that of all networks, and the gate."""
    student = ["model.student.mean", "model.student.std"]
    networks = [f"{name}.{part}" for name in ("model.student", "teacher1", "teacher2") for part in ("mean", "std")]
    left = {profile: told_by_data.empty(recipe.read(config_of("l2_cccp", profile))) for profile in PROFILES}
    assert left == {"": student, "small": [], "digits": [], "own": [*networks, "enable_kd_after_syn_acc"]}


def test_locked_and_unknown_profile():
    config = config_of("l4_full", "digits")
    with pytest.raises(AttributeError, match="kd_alfa"):
        config.kd_alfa = 0.5
    with pytest.raises(ValueError, match=r"unknown profile 'digts'.*\['', 'digits', 'own', 'small'\]"):
        config_of("l4_full", "digts")


QUOTED = r"`([^`]+)`"


def test_the_documentation_lists_the_keys_as_they_are():
    """Else: python tests/key_table.py"""
    text = key_table.DOCUMENT.read_text()
    assert text == key_table.rewritten(text)
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| .+? \|", text[text.index("| key | default |") :], flags=re.MULTILINE)
    networks = {"teacherK.name": "`'convnext_l'`, `'resnet152'`"}
    assert dict(rows) == {key: f"`{value!r}`" for key, value in defaults().items()} | networks


def defaults() -> dict:
    """Every leaf of base.py, the first teacher's under `teacherK`."""
    leaves = flat(base.defaults())
    return {key.replace("teacher1.", "teacherK."): value for key, value in leaves.items() if "teacher2." not in key}


def test_every_key_of_the_original_has_its_successor():
    """Kept under its name, alike or with a difference, renamed or dropped; no name is told twice."""
    text = key_table.DOCUMENT.read_text()
    original = text[text.index("These have the same name") : text.index("| key | default |")]
    alike, table = original.split("| key | here |")
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", table, flags=re.MULTILINE)
    cells = [(key, cell) for keys, cell in rows for key in re.findall(QUOTED, keys)]
    kept = [key for key, cell in cells if cell == "kept"] + re.findall(QUOTED, alike.partition("Of the others")[0])
    assert len(kept) == len(set(kept)) and len(cells) == len(dict(cells)) and len(kept) > 60
    renamed = {key for _, cell in cells for key in re.findall(QUOTED, cell)}
    assert {*kept, *renamed} <= defaults().keys()
    assert {cell for _, cell in cells if not cell.startswith("`")} == {"kept", "dropped"}
    assert not {key for key, cell in cells if cell == "dropped"} & defaults().keys()
