"""What was run for results.md's section on teachers: scenarios, each a list of rows, of which a run is one seed.

Rows are of cifar16.py; `teachers.py` makes commands, tables and the figure of them.
"""

from typing import Any

CHOICE = "9"  # the seed on which settings are chosen
SETTINGS = [(0.65, 0.35, 4.0), (0.65, 0.35, 10.0), (0.1, 0.9, 4.0), (0.1, 0.9, 10.0)]  # ce_alpha, kd_alpha, tau
FIRST, SECOND = "teacher1.train_epochs", "teacher2.train_epochs"
CROPS, LABELS = {"dataset.data_aug": 1, "b_step_views": 4}, "labels alone"
WEAK = {FIRST: 15, "teacher2.name": "resnet8", SECOND: 5}


def specialists(overlap: int) -> list[tuple[str, str, dict[str, Any]]]:
    shared = {FIRST: 15, SECOND: 15, "specialists.overlap": overlap}
    return [
        ("average over the knowing", "l0_baseline", shared),
        (LABELS, "ce_only", {}),
        ("max_conf", "l0_baseline", shared | {"kd_target": "max_conf"}),
        ("synergy, on nothing", "l1_ib", shared | {"synergy_base": "none", "ib_mbm_kv": "feat"}),
        ("synergy, on the mixture", "l1_mixture", shared | {"ib_mbm_kv": "feat_prob"}),
    ]


# Scenario -> row, config of cifar16.py, overrides. Rows are compared with the first of their scenario.
SCENARIOS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "One teacher, images as they are": [
        (LABELS, "ce_only", {}),
        ("5 epochs", "l0_baseline,one", {FIRST: 5}),
        ("15 epochs", "l0_baseline,one", {FIRST: 15}),
        ("60 epochs", "l0_baseline,one", {FIRST: 60}),
        ("60 epochs, temperature=0", "l0_baseline,one", {FIRST: 60, "teacher1.temperature": 0.0}),
        ("60 epochs, 2 folds", "l0_baseline,one", {FIRST: 60, "teacher_folds": 2}),
        ("60 and 15 epochs, average", "l0_baseline", {FIRST: 60, SECOND: 15}),
        ("60 and 15 epochs, synergy", "l1_avg", {FIRST: 60, SECOND: 15}),
    ],
    "One teacher, crop and flip": [
        (LABELS, "ce_only", CROPS),
        ("5 epochs", "l0_baseline,one", CROPS | {FIRST: 5}),
        ("15 epochs", "l0_baseline,one", CROPS | {FIRST: 15}),
        ("60 epochs", "l0_baseline,one", CROPS | {FIRST: 60}),
    ],
    "Two specialists that share 20 % of the classes": specialists(20),
    "Two specialists that share no class": specialists(0),
    "A strong and a weak teacher": [
        ("average", "l0_baseline", WEAK),
        ("strong alone", "l0_baseline,one", {FIRST: 15}),
        ("weak alone", "l0_baseline,one", {"teacher1.name": "resnet8", FIRST: 5}),
        ("weighted_conf", "l0_baseline", WEAK | {"kd_target": "weighted_conf"}),
        ("synergy, on the average", "l1_avg", WEAK),
    ],
}
