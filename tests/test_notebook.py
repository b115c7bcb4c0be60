"""`asib_jax.distil`: a whole run from Python, against what the launch scripts make of it."""

import subprocess
import sys

import numpy as np
import pytest
from networks import make_split
from tiny_runs import tiny_networks

import asib_jax
from asib_jax import evaluation
from asib_jax.errors import UserError
from asib_jax.record.finished import read_recipe

KEYS = {
    "dataset": {"batch_size": 8, "data_aug": 0, "val_fraction": 0.2, "train_subset": 0},
    "distill_out_dim": 8,
    "ib_mbm_out_dim": 8,
    "ib_mbm_n_head": 2,
    "num_devices": 1,
    "student_epochs_per_stage": (2,),
    "teacher_adapt_epochs": 2,
    "synergy_only_epochs": 1,
    "a_step_views": 0,
    "b_step_views": 0,
    "schedule": {"lr_warmup_epochs": 0},
    "tensorboard": False,
    "pictures": False,
}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    training, test = make_split(100), make_split(23, seed=1)
    return {"x_train": training.image, "y_train": training.label, "x_test": test.image, "y_test": test.label}


@pytest.mark.usefixtures("quick_compilation")
def test_teachers_student_and_arrays_in_a_run_out(tmp_path, arrays):
    def distil(**more):
        return asib_jax.distil(
            "l2_cccp:digits",
            data=arrays,
            student="tiny",
            teachers=[
                {"name": "tiny_teacher", "train_epochs": 2, "warmup_epochs": 0},
                {"name": "tiny_teacher", "train_epochs": 1, "warmup_epochs": 1},
            ],
            results_dir=str(tmp_path),
            **{**KEYS, **more},
        )

    with tiny_networks():
        run = distil(tau=3.0)
        again = evaluation.evaluate_run(run.folder)
        assert distil(tau=3.0, resume="latest") == run  # which has finished
        probabilities = run.predict(arrays["x_test"], "last")
        with pytest.raises(UserError, match=r"images \[23, 4, 8, 3\]: those of the run in .* are \[N, \*\(8, 8, 3\)\]"):
            run.predict(arrays["x_test"][:, :4])
        with pytest.raises(UserError, match="control_best"):  # which it has
            run.predict(arrays["x_test"], "first")
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    correct = int((probabilities.argmax(axis=1) == arrays["y_test"]).sum())
    assert correct == round(23 * run.metrics["final/test_acc_last"])
    assert run.table == again + "\n" and "student, best" in run.table
    assert run.metrics["final/test_count"] == 23
    recipe = read_recipe(run.folder)
    assert [(teacher.name, teacher.train_epochs, teacher.warmup_epochs) for teacher in recipe.teachers] == [
        ("tiny_teacher", 2, 0),
        ("tiny_teacher", 1, 1),
    ]
    assert (recipe.model.student.name, recipe.tau, recipe.dataset.batch_size) == ("tiny", 3.0, 8)
    with np.load(recipe.dataset.path) as kept:
        assert all((kept[name] == array).all() for name, array in arrays.items())
    (file,) = (tmp_path / "data").iterdir()  # once for both
    assert str(file) == recipe.dataset.path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": "l2_ccc"}, "config='l2_ccc' is unknown"),
        ({"tao": 3.0}, "unknown key tao; did you mean tau"),
        ({"schedule": {"tipe": "cosine"}}, "unknown key schedule.tipe; did you mean schedule.type"),
        ({"student": "resnet7"}, "unknown model 'resnet7'; model.student.name must be one of resnet8"),
        ({"teachers": ["resnet8", "resnet7"]}, "unknown model 'resnet7'; teacher2.name must"),
        ({"teachers": []}, "0 teachers configured"),
        ({"teachers": [{"name": "resnet8", "weights": "none.npz"}] * 2}, "teacher1.weights='none.npz'"),
        ({"data": {"x_train": np.zeros(3)}}, "has no y_train, x_test, y_test"),
        ({"data": "nowhere"}, "dataset.path = 'nowhere' does not exist"),
    ],
)
def test_what_is_wrong_is_told_before_a_run_has_a_folder(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        asib_jax.distil(**{"config": "l2_cccp:digits", "results_dir": str(tmp_path), **changes})
    assert not list(tmp_path.iterdir())


def test_importing_the_package_does_not_import_jax():
    told = subprocess.run(
        [sys.executable, "-c", "import sys, asib_jax; print('jax' in sys.modules)"], capture_output=True, text=True
    )
    assert told.stdout == "False\n", told.stderr
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        _ = asib_jax.distill
