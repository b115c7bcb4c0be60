"""The command line as a user meets it: whole runs."""

import csv
import hashlib
import json

import pytest
from launching import launch, launch_process
from tiny_runs import tiny_networks

CONFIGS = ("ce_only", "l0_baseline", "side_fusion", "l1_ib", "l2_cccp", "l3_tadapt", "l4_full", "side_cccp_ppf")
SHORT = (
    "--config.num_devices=1",
    "--config.model.student.name=tiny_scratch",
    "--config.student_epochs_per_stage=(1,1)",
    "--config.schedule.lr_warmup_epochs=1",
)
TEACHERS = (
    "--config.teacher_adapt_epochs=1",
    *(
        f"--config.teacher{k}.{key}"
        for k in (1, 2)
        for key in ("name=tiny_teacher", "train_epochs=1", "warmup_epochs=1")
    ),
)


def table(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("name")) :][:13]


def evaluate_edited(folder, **student):
    """After such an edit of the student in config.json."""
    config = json.loads((folder / "config.json").read_text())
    config["model"]["student"] |= student
    (folder / "config.json").write_text(json.dumps(config))
    return launch("evaluate", str(folder))


@pytest.fixture
def networks():
    with tiny_networks():
        yield


@pytest.mark.usefixtures("networks", "quick_compilation")
def test_a_run_leaves_its_record_and_evaluates_again_from_disk(tmp_path):
    results = f"--config.results_dir={tmp_path}"
    first = launch("main", "--config=configs/l2_cccp.py:digits", results, *SHORT, *TEACHERS)
    assert first.returncode == 0, first.stderr
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115  # what cannot be told ends no run
    labels = (
        "--config=configs/ce_only.py:digits",
        results,
        "--config.pictures=False",
        *SHORT,
        "--config.train_control=False",
    )
    second = launch("main", *labels, console=full)
    assert second.returncode == 0, second.stderr

    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["l2_cccp_digits_0", "ce_only_digits_0"]
    networks = "model.student.name=tiny_scratch num_devices=1 pictures=False schedule.lr_warmup_epochs=1"
    assert rows[1]["overrides"] == f"{networks} student_epochs_per_stage=(1,1) train_control=False"
    digest = hashlib.sha256(rows[1]["overrides"].encode()).hexdigest()[:4]
    assert rows[1]["exp_id"].startswith(f"ce_only_digits_0_{digest}_20")
    assert [row["teachers"] for row in rows] == ["tiny_teacher tiny_teacher", ""]
    assert {(row["dataset"], row["student"]) for row in rows} == {("digits", "tiny_scratch")}
    assert {row["status"] for row in rows} == {"finished"} and not any(None in row for row in rows)
    assert (tmp_path / "latest").resolve() == (tmp_path / rows[1]["exp_id"]).resolve()
    folder = tmp_path / rows[0]["exp_id"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert rows[0]["test_acc_best"] == repr(metrics["final/test_acc_best"])
    assert rows[1]["test_acc_synergy_best"] == ""  # not measured, so empty, not 0
    assert metrics["final/test_count"] == 539
    assert {
        "stage1/a/epoch01/val_synergy",
        "stage2/b/epoch01/val_student",
        "control/stage2/b/epoch01/val_control",
        "stage1/b/before/val_without_teachers",
    } <= metrics.keys()

    log = (tmp_path / "latest" / "log.txt").read_text()
    assert "the console takes no more" in log and f"record: {tmp_path / rows[1]['exp_id']}" in log
    shown = table(first.stderr)
    assert [line.split("  ")[0] for line in shown[1:11]] == [
        "teacher1 (tiny_teacher)",
        "teacher2 (tiny_teacher)",
        "teachers' average",
        f"best training-free ({metrics['final/training_free']})",
        "synergy ensemble",
        "synergy, teachers zeroed",
        "student alone, last",
        "student alone, best",
        "student, last",
        "student, best",
    ]
    drawn = {f"pictures/{name}.png" for name in ("curves", "confusion", "classes", "mistakes")}
    for name in drawn:
        (folder / name).unlink()  # FileNotFoundError for one that the run did not draw
    again = launch("evaluate", f"--run={folder}", "--pictures")
    assert again.returncode == 0, again.stderr
    assert {str(path.relative_to(folder)) for path in folder.glob("pictures/*")} == drawn
    assert table(again.stdout) == shown and "not what the run ended with" not in again.stderr
    edited = evaluate_edited(folder, mean=[0.9])
    assert edited.returncode == 0 and f"test_acc_last {metrics['final/test_acc_last']}, now " in edited.stderr
    edited = evaluate_edited(folder, name="resnet8")
    assert edited.returncode == 2 and "config.json is not what the run began with: its model.student" in edited.stderr


def test_check_devices_from_another_folder(tmp_path):
    passed = launch_process("check_devices", "--expect=1", cwd=tmp_path)
    assert passed.returncode == 0, passed.stderr
    assert "TFLOP/s" in passed.stdout and passed.stdout.endswith("no fault found\n")


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs_to_the_end(config, tmp_path):
    result = launch_process("main", f"--config=configs/{config}.py:digits", f"--config.results_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "student, best" in result.stderr
