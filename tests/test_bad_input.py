"""What users get wrong: each is refused with one message, before anything is compiled or written.

CASES go through the functions that launch/main.py calls until a run's folder exists; SCRIPTS are the scripts.
"""

import fcntl
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import ROOT, launch, launch_process
from networks import random_values
from PIL import Image
from test_recipe import A_FILE, STEADY, changed

from asib_jax import models, preparation, recipe
from asib_jax.errors import UserError
from asib_jax.models.kd_model import KDModel
from asib_jax.recipe import checks, keys
from asib_jax.recipe.keys import flat
from asib_jax.record.experiment import Record
from asib_jax.weights import torch_names
from configs import l4_full

ABSENT = "gpu" if jax.default_backend() == "cpu" else "cpu"
FINETUNED = {"teacher1.weights": A_FILE, "teacher1.train_epochs": 0, "teacher1.finetune_epochs": 3}
GIVEN = {"teacher1.name": "resnet8", "teacher1.train_epochs": 0}
STUDENT = {"model.student.name": "resnet8_pretrain"}
USED = {"teacher1.weights": A_FILE, "teacher1.train_epochs": 0, "teacher1.saw_val": False}
FOLDS, HELD = (
    {"teacher_folds": 2, "a_step_views": 16, "b_step_views": 60},
    {"teacher_holdout": 0.2, "student_images": "holdout"},
)
IN_A = {"use_teacher_finetuning": True, "train_distill_adapter_only": False}
NO_TEACHERS = {"ce_alpha": 1.0, "kd_alpha": 0.0}


def npz(name: str) -> dict:
    """A data file of the fixture `files`, with the digits' other settings."""
    return {"dataset.name": "npz", "dataset.path": f"FILES/{name}.npz", "dataset.train_subset": 0}


def pictures(name: str) -> dict:
    """The same of a folder of pictures."""
    return {"dataset.name": "folder", "dataset.path": f"FILES/pictures/{name}", "dataset.train_subset": 0}


# What is changed in `configs/l4_full.py:digits` (FILES/: in the folder of `files`; ...: taken out), and what the
# message must hold. Four devices are simulated; without a change the recipe passes.
CASES = [
    # keys and types
    ({"tua": 4.0}, "unknown key tua", "tau"),
    ({"dataset.pth": ""}, "unknown key dataset.pth", "dataset.path"),
    ({"teacher2.wieghts": ""}, "unknown key teacher2.wieghts", "teacher2.weights"),
    ({"techer1": {}}, "unknown key techer1; did you mean teacher1?"),
    ({"teachers": ()}, "unknown key teachers", "teacher1, teacher2"),
    ({"seed": "x"}, "seed='x'", "int is needed"),
    ({"seed": 1.5}, "seed=1.5", "int is needed"),
    ({"use_ib": 1}, "use_ib=1", "bool is needed"),
    ({"student_epochs_per_stage": (1, "2")}, "student_epochs_per_stage='2'", "int is needed"),
    ({"dataset": 3}, "dataset=3", "a group of keys"),
    ({"tau": ...}, "missing keys: tau"),
    ({"teacher1": ...}, "without a gap", "['teacher2']"),
    # numbers
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"seed": 2**31}, f"seed={2**31}", "2**31"),
    ({"student_epochs_per_stage": (10, 10**30)}, "student_epochs_per_stage=(10, 1000", "2**31"),
    ({"dataset.batch_size": -(2**40)}, f"dataset.batch_size={-(2**40)}", "2**31"),
    ({"tau": float("nan")}, "tau=nan", "finite"),
    ({"student_lr": float("inf")}, "student_lr=inf", "finite"),
    ({"tau_schedule": (2.0, float("nan"))}, "tau_schedule=(2.0, nan)", "finite"),
    ({"teacher_lr": float("nan")}, "teacher_lr=nan", "finite"),
    ({"teacher1.std": (float("nan"),)}, "teacher1.std=(nan,)", "finite"),
    ({"model.student.mean": (float("-inf"),)}, "model.student.mean=(-inf,)", "finite"),
    ({"checkpoint_minutes": -1.0}, "checkpoint_minutes=-1.0", "at least 0"),
    ({"checkpoint_steps": -1}, "checkpoint_steps=-1", "at least 0"),
    ({"max_nonfinite_steps": 0}, "max_nonfinite_steps=0", "at least 1"),
    # the machine
    ({"num_devices": 9}, "num_devices=9", "4 are here"),
    ({"num_devices": -1}, "num_devices=-1", "at least 0"),
    ({"platform": "tpu"}, "platform='tpu'", "'gpu', 'cpu'"),
    ({"platform": ABSENT}, f"platform={ABSENT}", jax.devices()[0].device_kind, "JAX_PLATFORMS", "requirements.txt"),
    ({"wandb": "mine"}, "wandb='mine'", "pip install wandb"),
    # where results go
    ({"exp_id": "earlier"}, "exp_id='earlier'", "exists; choose another"),
    ({"exp_id": "a/b"}, "exp_id='a/b'", "results_dir"),
    ({"exp_id": "teachers"}, "exp_id='teachers'", "choose another"),
    ({"exp_id": "mine", "resume": "FILES/results/earlier"}, "exp_id='mine'", "resume="),
    ({"results_dir": "FILES/file"}, "results_dir=", "Not a directory"),
    ({"results_dir": "FILES/file/below"}, "results_dir=", "Not a directory"),
    ({"results_dir": ""}, "results_dir is empty", "'.'"),
    ({"results_dir": "/proc/results"}, "results_dir='/proc/results'", "no run can be recorded there"),
    ({"teacher_cache": "FILES/file/below"}, "teacher_cache=", "/file is no folder"),
    ({"results_dir": "~nobodyhere/runs"}, "results_dir='~nobodyhere/runs'", "home directory"),
    ({"resume": "~nobodyhere/run"}, "resume='~nobodyhere/run'", "home directory"),
    ({"teacher_cache": "~nobodyhere/x"}, "teacher_cache='~nobodyhere/x'", "home directory"),
    # data
    ({"dataset.name": "cifar10"}, "dataset.name='cifar10'", "'cifar100', 'digits'"),
    ({"dataset.path": A_FILE}, "dataset.path=", "scikit-learn"),
    ({"dataset.name": "npz"}, "dataset.path", "x_train"),
    (npz("missing"), "dataset.path", "missing.npz", "does not exist"),
    (npz("good") | {"dataset.path": "~nobodyhere/x.npz"}, "dataset.path='~nobodyhere/x.npz'", "home directory"),
    ({"dataset.name": "cifar100", "dataset.data_dir": "~nobodyhere"}, "dataset.data_dir='~nobodyhere'", "home"),
    (npz("text"), "text.npz", "not an .npz"),
    (npz("empty"), "empty.npz", "not an .npz"),
    (npz("cut"), "cut.npz", "not an .npz"),
    (npz("flipped"), "flipped.npz", "x_train"),
    (npz("folder"), "folder.npz", "npz"),
    (npz("unreadable"), "unreadable.npz", "npz"),
    (npz("no_labels"), "no_labels.npz", "y_test", "x_train"),
    (npz("objects"), "objects.npz", "y_train"),
    (npz("label_above"), "label_above.npz", "y_test", "0..9", "dataset.path="),
    (npz("label_below"), "label_below.npz", "y_train", "-1"),
    (npz("label_float"), "label_float.npz", "y_train", "integers"),
    (npz("label_count"), "label_count.npz", "y_train", "one per image"),
    (npz("flat"), "flat.npz", "x_train", "[N,H,W,channels]"),
    (npz("float"), "float.npz", "x_train", "float32"),
    (npz("nan"), "nan.npz", "x_test", "float32", "dataset.path="),
    (npz("sizes"), "sizes.npz", "x_test", "x_train"),
    (pictures("cut"), "ant/0.png cannot be read as a picture", "dataset.path="),
    (pictures("sizes"), "ant/0.png is 8x8 but ", "bee/1.png is 9x8", "dataset.image_size=N"),
    (pictures("pipe"), "ant/x.png is no file but a pipe"),
    (pictures("alone"), "of one class, 'ant'"),
    (pictures("few"), "every class needs 3 pictures", "bee (2)"),
    (pictures("good") | {"dataset.batch_size": 32}, "dataset.batch_size=32", "images to train on"),
    (npz("channels_first"), "channels_first.npz", "x_test", "[20, 1, 8, 8]", "transpose(0, 2, 3, 1)"),
    (npz("channels"), "channels.npz", "x_train", "1 to 4 channels", "[60, 8, 8, 5]"),
    (npz("one_class"), "one_class.npz", "of one class, '0'"),
    (npz("no_x_val"), "no_x_val.npz", "y_val without x_val"),
    (npz("x_val"), "x_val.npz", "x_val", "float32 in 0..255", "astype(np.uint8)"),
    (npz("pipe"), "dataset.path", "pipe.npz", "is a pipe"),
    (npz("good") | {"dataset.image_size": -1}, "dataset.image_size=-1", "in [0, 4096]"),
    (npz("good") | {"dataset.image_size": 5000}, "dataset.image_size=5000", "in [0, 4096]"),
    (npz("no_images"), "no_images.npz", "x_train", "not empty"),
    (npz("names"), "names.npz", "class_names"),
    (npz("colour") | {"model.student.mean": (0.1, 0.2)}, "model.student.mean=(0.1, 0.2)", "3 channels"),
    ({"teacher2.std": (0.2, 0.2, 0.2)}, "teacher2.std=(0.2, 0.2, 0.2)", "1 channels"),
    ({"dataset.name": "cifar100", "dataset.path": "FILES/cut.tar.gz"}, "cut.tar.gz", "archive", "dataset.path="),
    ({"dataset.name": "cifar100", "dataset.path": "FILES/results"}, "results", "binary"),
    ({"dataset.name": "folder", "dataset.path": "FILES/file"}, "train/<class>", "dataset.path"),
    ({"dataset.name": "imagenet32", "dataset.path": "FILES/results"}, "train_data_batch_1.npz", "dataset.path"),
    ({"dataset.batch_size": 0}, "dataset.batch_size=0", "positive"),
    ({"dataset.batch_size": -32}, "dataset.batch_size=-32", "positive"),
    ({"dataset.batch_size": 30}, "dataset.batch_size=30", "4 devices", "num_devices"),
    ({"dataset.batch_size": 4000}, "dataset.batch_size=4000", "100 images"),
    ({"dataset.data_aug": 7}, "dataset.data_aug=7", "valid: 0, 1, 2, 3"),
    ({"dataset.val_fraction": 0.0}, "dataset.val_fraction=0.0", "in (0, 1)"),
    ({"dataset.val_fraction": 1.0}, "dataset.val_fraction=1.0", "in (0, 1)"),
    ({"dataset.val_fraction": 0.001}, "dataset.val_fraction = 0.001", "each of 10 classes", "between 0.00795 and"),
    ({"dataset.val_fraction": 0.999}, "dataset.val_fraction = 0.999", "each of 10 classes"),
    (npz("lonely"), "1 of 10 classes have a single training image (9)", "x_val"),
    ({"dataset.train_subset": -5}, "dataset.train_subset=-5", "at least 0"),
    ({"dataset.train_subset": 5}, "dataset.train_subset = 5", "10 (one image a class)"),
    ({"dataset.train_subset": 10**6}, "dataset.train_subset = 1000000", "..1006"),
    # folds and hold-outs
    ({"teacher_folds": 1}, "teacher_folds=1 leaves no image", "2 or more, or 0"),
    ({"teacher_folds": -1}, "teacher_folds=-1", "in [0, 100]"),
    ({"teacher_holdout": 1.0}, "teacher_holdout=1.0", "in [0, 1)"),
    ({**FOLDS, "teacher_holdout": 0.2}, "teacher_folds=2 and teacher_holdout=0.2 are both set", "one of them to 0"),
    ({"student_images": "holdout"}, "student_images='holdout' needs teacher_holdout", "student_images='all'"),
    ({"teacher_holdout": 0.2, "student_images": "held"}, "student_images='held'", "'holdout'"),
    ({**FOLDS, "teacher_deploy": "none"}, "teacher_deploy='none'", "'copies', 'all'"),
    ({**FOLDS, "teacher_deploy": "all"}, "teacher_deploy='all'", "teacher_deploy='copies'", "kd_target='avg'"),
    ({**FOLDS, "a_step_views": 0}, "teacher_folds=2 with a_step_views=0", "a_step_views=4", "teacher_folds=0"),
    ({**FOLDS, "b_step_views": 0}, "teacher_folds=2 with b_step_views=0", "b_step_views=20"),
    ({**FOLDS, "mixup_alpha": 0.2}, "teacher_folds=2 with mixup_alpha or cutmix_alpha_distill", "both to 0"),
    ({**FOLDS, "cutmix_alpha_distill": 1.0}, "teacher_folds=2 with mixup_alpha or cutmix_alpha_distill"),
    ({**FOLDS, **IN_A}, "use_teacher_finetuning", "teacher_folds=2 keeps from them"),
    ({"teacher_holdout": 0.2, **IN_A}, "use_teacher_finetuning", "teacher_holdout=0.2 keeps"),
    ({**FOLDS, **USED}, "teacher_folds=2", f"teacher1.weights='{A_FILE}' are used as they are", "finetune_epochs"),
    ({"teacher_holdout": 0.2, **USED}, "teacher_holdout=0.2", f"teacher1.weights='{A_FILE}' are used as they are"),
    ({**FOLDS, **FINETUNED}, "teacher_folds=2, but teacher1.saw_val=True", "teacher1.saw_val=False"),
    ({"teacher_holdout": 0.2, **FINETUNED}, "teacher_holdout=0.2, but teacher1.saw_val=True"),
    (
        {**FOLDS, "teacher_folds": 100},
        "teacher_folds=100",
        "2 of 10 classes have fewer that differ: 2 (99), 8 (98)",
        "=98 or",
    ),
    ({"teacher_holdout": 0.001}, "teacher_holdout=0.001 asks for 1 of 1006 images", "each of 10 classes"),
    ({**HELD, "dataset.train_subset": 300}, "dataset.train_subset=300 is more than the 201", "teacher_holdout=0.2"),
    ({**HELD, "dataset.train_subset": 0, "dataset.batch_size": 256}, "256 is larger than the 201 images to train on"),
    ({**FOLDS, "device_data_gb": 1e-4}, "teacher_folds=2 needs", "on all 20 views", "more than device_data_gb=0.0001"),
    ({"enable_kd_after_syn_acc": 0.05}, "enable_kd_after_syn_acc=0.05", "below chance for 10 classes"),
    # networks and their weights
    ({"model.student.name": "resnet9"}, "model.student.name", "resnet8, resnet14"),
    ({"model.student.name": "resnet8_pretrain"}, "model.student.weights", "_scratch"),
    ({"model.student.weights": A_FILE}, "model.student.weights=", "_pretrain"),
    ({"model.student.std": (0.0,)}, "model.student.std=(0.0,)", "[0.001, 10]"),
    ({"teacher2.std": (-1.0,)}, "teacher2.std=(-1.0,)", "[0.001, 10]"),
    ({"model.student.name": "convnext_s", "dataset.small_input": False}, "images of 8x8 pixels", "dataset.small_input"),
    ({"teacher2.name": "vgg19"}, "teacher2.name", "resnet8, resnet14"),
    ({"teacher2.train_epochs": 0}, "teacher2.weights", "teacher2.train_epochs"),
    ({"teacher1.weights": A_FILE}, "teacher1.weights and teacher1.train_epochs", "keep one"),
    ({"teacher1.weights": "no.npz", "teacher1.train_epochs": 0}, "teacher1.weights='no.npz'", "does not exist"),
    (
        {"model.student.name": "resnet8", "model.student.weights": "no.npz"},
        "model.student.weights='no.npz'",
        "does not exist",
    ),
    (GIVEN | {"teacher1.weights": "~nobodyhere/w.npz"}, "weights='~nobodyhere/w.npz'", "home directory"),
    (GIVEN | {"teacher1.weights": A_FILE}, "teacher1.weights=", ".safetensors, .npz"),
    (GIVEN | {"teacher1.weights": "FILES/text.npz"}, "teacher1.weights=", "cannot read weights", "text.npz"),
    (GIVEN | {"teacher1.weights": "FILES/text.safetensors"}, "teacher1.weights=", "cannot read weights"),
    (GIVEN | {"teacher1.weights": "FILES/pointer.safetensors"}, "teacher1.weights=", "git-lfs", "`git lfs pull`"),
    (GIVEN | {"teacher1.weights": "FILES/text.pth"}, "teacher1.weights=", "cannot read weights"),
    (GIVEN | {"teacher1.weights": "FILES/results"}, "teacher1.weights=", "/results"),
    (GIVEN | {"teacher1.weights": "FILES/resnet14.npz"}, "teacher1.weights=", "do not fit", "layer1.1."),
    (
        GIVEN | {"teacher1.weights": "FILES/seven.npz"},
        "teacher1.weights=",
        "fit resnet8 only in part",
        "(64, 7)",
        "teacher1.finetune_epochs",
    ),
    (STUDENT | {"model.student.weights": "FILES/resnet14.npz"}, "model.student.weights=", "do not fit", "layer1.1."),
    *(
        (given | {f"{key}.weights": f"FILES/{name}.npz"}, f"{key}.weights=", f"/{name}.npz", "broken", leaf, word)
        for name, leaf, word in (
            ("not_a_number", "params/stem/conv/kernel", "1 of 144 numbers are not finite"),
            ("huge", "params/layer1/block0/bn1/scale", "1e+38"),
            ("below_zero", "batch_stats/stem/bn/var", "a variance of -1"),
            ("quantised", "params/classifier/kernel", "int8"),
        )
        for key, given in (("teacher1", GIVEN), ("model.student", STUDENT))
    ),
    (FINETUNED | {"teacher1.weights": "hf:timm"}, "hf:timm", "hf:OWNER/REPO"),
    (FINETUNED | {"teacher1.name": "resnet14_scratch"}, "teacher1.name='resnet14_scratch'", "without _scratch"),
    (
        FINETUNED | {"teacher1.name": "efficientnet_b0", "teacher1.weights": "hf:timm/tf_efficientnet_b0.ns_jft_in1k"},
        "teacher1.weights='hf:timm/tf_efficientnet_b0",
        "without tf_",
    ),
    (
        FINETUNED
        | {"teacher1.weights": "hf:timm/resnet14.tv2_in1k", "teacher1.saw_val": False, "dataset.name": "imagenet32"},
        "teacher1.saw_val=False",
        "set teacher1.saw_val=True",
    ),
    (
        STUDENT
        | {
            "model.student.weights": "hf:timm/resnet14.tv2_in1k",
            "model.student.saw_val": False,
            "dataset.name": "imagenet32",
        },
        "model.student.saw_val=False",
        "set model.student.saw_val=True",
    ),
    # stages, epochs, schedules
    ({"student_epochs_per_stage": ()}, "student_epochs_per_stage", "empty"),
    ({"student_epochs_per_stage": (10, 0)}, "student_epochs_per_stage=(10, 0)", "at least 1"),
    ({"student_epochs_per_stage": (-10, 10)}, "student_epochs_per_stage=(-10, 10)", "at least 1"),
    ({"num_stages": 3}, "num_stages=3", "2 entries"),
    ({"teacher_adapt_epochs": -3}, "teacher_adapt_epochs=-3", "at least 0"),
    ({"student_freeze_level": (-1, 1, 2)}, "student_freeze_level=(-1, 1, 2)", "one per stage (2)"),
    ({"student_freeze_level": (-1, 5)}, "student_freeze_level=5", "0 to 4"),
    ({"student_freeze_level": (-2,)}, "student_freeze_level=-2", "0 to 4"),
    ({"teacher2.freeze_level": (1, 1, 1)}, "teacher2.freeze_level=(1, 1, 1)", "one per stage (2)"),
    (
        {"teacher2.freeze_level": (7,), "use_teacher_finetuning": True, "train_distill_adapter_only": False},
        "teacher2.freeze_level=7",
        "0 to 4",
    ),
    (FINETUNED | {"teacher1.finetune_freeze_level": 5}, "teacher1.finetune_freeze_level=5", "0 to 4"),
    ({"tau_schedule": (2.0,)}, "tau_schedule=(2.0,)", "2 entries"),
    ({"tau_schedule": (0.0, 4.0)}, "tau_schedule=(0.0, 4.0)", "[0.01, 1000]"),
    ({"tau": 0.0}, "tau=0.0", "[0.01, 1000]"),
    ({"tau_decay_power": 0.0}, "tau_decay_power=0.0", "(0, 100]"),
    ({"tau": -4.0}, "tau=-4.0", "[0.01, 1000]"),
    ({"beta_schedule": (0.0, 1e-4)}, "beta_schedule=(0.0, 0.0001)", "3 entries"),
    ({"beta_schedule": (0.0, -1.0, 5)}, "beta_schedule=(0.0, -1.0, 5.0)", "[0, 1e+06]"),
    ({"profile_steps": (10,)}, "profile_steps=(10,)", "2 entries"),
    ({"profile_steps": (15, 10)}, "profile_steps=(15, 10)", "first and the last"),
    ({"profile_steps": (-5, 10)}, "profile_steps=(-5, 10)", "at least 0"),
    ({"schedule.type": "linear"}, "schedule.type='linear'", "cosine"),
    ({"schedule.milestones": (20, 10)}, "schedule.milestones=(20, 10)", "rising"),
    ({"schedule.milestones": (-1, 10)}, "schedule.milestones=(-1, 10)", "at least 1"),
    ({"schedule.min_lr": 5e-4}, "schedule.min_lr=0.0005", "a_step_lr=0.0001"),
    ({"schedule.step_size": 0}, "schedule.step_size=0", "at least 1"),
    ({"schedule.gamma": 0.0}, "schedule.gamma=0.0", "(0, 1]"),
    (
        {"schedule.lr_warmup_epochs": 17},
        "schedule.lr_warmup_epochs=17",
        "16 A-epochs",
        "--config.schedule.lr_warmup_epochs=16",
    ),
    (
        {"schedule.lr_warmup_epochs": 21, "teacher_adapt_epochs": 11},
        "schedule.lr_warmup_epochs=21",
        "20 B-epochs",
        "--config.schedule.lr_warmup_epochs=20",
    ),
    ({"schedule.lr_warmup_epochs": -1}, "schedule.lr_warmup_epochs=-1", "at least 0"),
    (
        {"teacher1.train_epochs": 1},
        "teacher1.warmup_epochs=2",
        "teacher1.train_epochs=1",
        "--config.teacher1.warmup_epochs=1",
    ),
    ({"teacher1.train_epochs": -1}, "teacher1", "train_epochs"),
    # learning
    ({"optimizer": "adam"}, "optimizer='adam'", "'adamw', 'sgd'"),
    ({"amp_dtype": "float64"}, "amp_dtype='float64'", "'bfloat16', 'float16', 'float32'"),
    ({"student_lr": 0.0}, "student_lr=0.0", "[1e-12, 100]"),
    ({"momentum": 1.5}, "momentum=1.5", "[0, 1]"),
    ({"a_step_views": -1}, "a_step_views=-1", "at least 0"),
    ({"device_data_gb": -0.5}, "device_data_gb=-0.5", "at least 0"),
    ({"bank_memory_gb": 8.0}, "unknown key bank_memory_gb"),
    ({"dataset.eval_batch_size": -1}, "dataset.eval_batch_size=-1", "at least 0"),
    ({"teacher_lr": -1.0}, "teacher_lr=-1.0", "[0, 100]"),
    ({"teacher_adapt_alpha_kd": -1.0}, "teacher_adapt_alpha_kd=-1.0", "[0, 1e+06]"),
    ({"teacher1.train_lr": 1e-6}, "schedule.min_lr=1e-05", "teacher1.train_lr=1e-06"),
    ({"teacher1.train_weight_decay": -1.0}, "teacher1.train_weight_decay=-1.0", "[0, 100]"),
    ({"teacher1.label_smoothing": 1.0}, "teacher1.label_smoothing=1.0", "[0, 1)"),
    ({"teacher1.finetune_epochs": 3}, "teacher1.finetune_epochs=3 needs teacher1.weights", "teacher1.train_epochs"),
    (
        {"teacher1.finetune_use_cutmix": True, "teacher1.finetune_cutmix_alpha": 0.0},
        "teacher1.finetune_cutmix_alpha=0.0",
        "(0, 1000]",
    ),
    (FINETUNED | {"teacher1.finetune_lr": 1e-6}, "schedule.min_lr=1e-05", "teacher1.finetune_lr=1e-06"),
    ({"teacher1.early_stopping_patience": -1}, "teacher1.early_stopping_patience=-1", "at least 0"),
    ({"teacher1.early_stopping_min_delta": 1.5}, "teacher1.early_stopping_min_delta=1.5", "[0, 1]"),
    # numbers that nothing can come of
    ({"ib_beta": 1e30}, "ib_beta=1e+30", "[0, 1e+06]"),
    ({"cccp_alpha": 1e38}, "cccp_alpha=1e+38", "[0, 1e+06]"),
    ({"synergy_kd_alpha": 1e300}, "synergy_kd_alpha=1e+300", "[0, 1e+06]"),
    ({"tau_schedule": (2.0, 1e30)}, "tau_schedule=(2.0, 1e+30)", "[0.01, 1000]"),
    ({"teacher2.temperature": -1.0}, "teacher2.temperature=-1.0", "[0, 1000]"),
    ({"teacher2.temperature": 1e4}, "teacher2.temperature=10000.0", "[0, 1000]"),
    ({"teacher1.temperature": 1e-30}, "teacher1.temperature=1e-30", "[0.01, 1000], or 0"),
    (
        {"teacher1.temperature": 0.0, "teacher1.weights": "w.npz", "teacher1.train_epochs": 0},
        "teacher1.temperature=0 compares",
        "teacher1.saw_val=False",
    ),
    ({"tau": 1e-30}, "tau=1e-30", "[0.01, 1000]"),
    ({"ce_alpha": 1e308, "kd_alpha": 1e308}, "ce_alpha=1e+308", "[0, 1e+06]"),
    ({"student_lr": 1e-300}, "student_lr=1e-300", "[1e-12, 100]"),
    ({"student_lr": 1e20}, "student_lr=1e+20", "[1e-12, 100]"),
    ({"schedule.gamma": 1e9}, "schedule.gamma=1000000000.0", "(0, 1]"),
    ({"model.student.mean": (129.3, 124.1, 112.4)}, "model.student.mean=(129.3, 124.1, 112.4)", "in [0, 1]"),
    ({"teacher1.std": (68.2,)}, "teacher1.std=(68.2,)", "[0.001, 10]"),
    ({"teacher1.std": (1e-30,)}, "teacher1.std=(1e-30,)", "[0.001, 10]"),
    ({"ib_mbm_logvar_clip": 100.0}, "ib_mbm_logvar_clip=100.0", "(0, 50]"),
    ({"ce_label_smoothing": 1.0}, "ce_label_smoothing=1.0", "[0, 1)"),
    ({"label_smoothing": 1.0}, "label_smoothing=1.0", "[0, 1)"),
    ({"student_epochs_per_stage": (10, 10**9)}, "1000000010 B-epochs", "student_epochs_per_stage"),
    ({"use_cccp": True, "cccp_nt": 10**6}, "16000000 A-epochs, more than 1000000", "cccp_nt"),
    (
        {"use_disagree_weight": True, "disagree_lambda_high": 0.0, "disagree_lambda_low": 0.0},
        "disagree_lambda_high and disagree_lambda_low are both 0",
    ),
    # teachers that know some classes
    ({"teacher1.classes": "0-12"}, "teacher1.classes='0-12'", "no label 12", "0..9"),
    ({"teacher2.classes": "0-5,5"}, "teacher2.classes='0-5,5'", "label 5 is named twice"),
    ({"teacher1.classes": "5-0"}, "teacher1.classes='5-0'", "5-0 runs backwards", "0..9"),
    ({"teacher1.classes": "3"}, "teacher1.classes='3'", "two classes"),
    ({"teacher1.classes": " "}, "teacher1.classes=' '", "'' is neither a label number nor a range"),
    ({"teacher1.classes": "0-4,"}, "teacher1.classes='0-4,'", "'' is neither"),
    ({"teacher1.classes": "-1"}, "teacher1.classes='-1'", "'-1' is neither"),
    ({"teacher1.classes": "0:5"}, "teacher1.classes='0:5'", "'0:5' is neither", "class's name: 0, 1, 2, 3, 4, ..."),
    ({"teacher1.classes": "0-999999999"}, "no label 999999999"),
    ({"teacher1.classes": "9" * 5000}, "teacher1.classes=", "is neither"),
    ({"teacher1.classes": (0, 1)}, "teacher1.classes=(0, 1)", "str is needed"),
    ({"specialists.overlap": 101.0}, "specialists.overlap=101.0", "in [0, 100]"),
    ({"specialists.overlap": -1.0}, "specialists.overlap=-1.0", "in [0, 100]"),
    ({"specialists.overlap": 20.0, "teacher2.classes": "0-4"}, "specialists.overlap=20", "teacher2.classes='0-4'"),
    ({"teacher1.classes": "0-5", "teacher2.classes": "4-7", "ce_alpha": 0.0}, "no teacher knows 8-9", "ce_alpha=0"),
    (
        {"kd_target": "teacher", "kd_teacher_index": 1, "teacher2.classes": "0-4"},
        *("kd_target='teacher'", "teacher2 knows 5 of 10 classes"),
    ),
    (
        {"teacher1.classes": "0-1", "dataset.batch_size": 400, "dataset.train_subset": 0},
        *("teacher1.classes='0-1'", "dataset.batch_size=400"),
    ),
    # distillation and fusion
    ({"ce_alpha": 0.0, "kd_alpha": 0.0}, "ce_alpha=0.0, kd_alpha=0.0", "their sum positive"),
    ({"ce_alpha": -0.1}, "ce_alpha=-0.1", "[0, 1e+06]"),
    ({"kd_max_ratio": -1.0}, "kd_max_ratio=-1.0", "[0, 1e+06]"),
    ({"kd_target": "mean"}, "kd_target='mean'", "'synergy', 'avg', 'weighted_conf', 'teacher'"),
    ({"kd_target": "teacher", "kd_teacher_index": 2}, "kd_teacher_index=2", "0..1"),
    ({"synergy_base": "average"}, "synergy_base='average'", "'', 'none', 'avg', 'mixture'"),
    ({"ib_mbm_kv": "prob"}, "ib_mbm_kv='prob'", "'', 'feat', 'feat_prob'"),
    ({"ib_mbm_teacher_dropout": 1.0}, "ib_mbm_teacher_dropout=1.0", "[0, 1)"),
    ({"kd_student_share": 1.0}, "kd_student_share=1.0", "[0, 1)"),
    ({"kd_student_share": -0.1}, "kd_student_share=-0.1", "[0, 1)"),
    ({"kd_student_share_end": 1.5}, "kd_student_share_end=1.5", "[0, 1)"),
    ({"kd_target": "label_conf", "ce_alpha": 0.0}, "kd_target='label_conf'", "ce_alpha=0 ", "'entropy'"),
    ({"kd_target": "label_conf", "mixup_alpha": 0.2}, "kd_target='label_conf'", "mixup_alpha"),
    ({"kd_target": "label_conf", "cutmix_alpha_distill": 1.0}, "kd_target='label_conf'", "cutmix_alpha_distill"),
    ({"teacher_adapt_epochs": 0}, "kd_target='synergy'", "teacher_adapt_epochs"),
    ({"kd_target": "avg", "teacher_adapt_epochs": 0, "feat_kd_alpha": 1.0}, "feat_kd_alpha", "teacher_adapt_epochs"),
    ({"teacher2": ...}, "1 teachers configured", "add teacher2"),
    ({"feat_kd_alpha": 1.0, "ib_mbm_out_dim": 32}, "distill_out_dim=64", "ib_mbm_out_dim=32"),
    (
        {"feat_kd_alpha": 1.0, "ib_mbm_out_dim": 32, "feat_kd_key": "feat_2d"},
        "feat_2d of width 64",
        "ib_mbm_out_dim=32",
        "feat_kd_alpha=0",
    ),
    ({"feat_kd_key": "feat_4d"}, "feat_kd_key='feat_4d'", "'distill_feat', 'feat_2d'"),
    (
        {"feat_kd_key": "distill_feat", "use_distillation_adapter": False, "train_distill_adapter_only": False},
        "feat_kd_key",
        "use_distillation_adapter",
    ),
    ({"use_distillation_adapter": False}, "train_distill_adapter_only", "use_distillation_adapter"),
    (
        {"use_distillation_adapter": False, "train_distill_adapter_only": False, "teacher1.name": "resnet8x4"},
        "different widths [256, 64]",
        "use_distillation_adapter=True",
    ),
    ({"use_teacher_finetuning": True}, "use_teacher_finetuning", "train_distill_adapter_only"),
    ({"mixup_alpha": 0.2, "cutmix_alpha_distill": 1.0}, "mixup_alpha and cutmix_alpha_distill", "set one of them to 0"),
    ({"disagree_mode": "logits"}, "disagree_mode='logits'", "'pred', 'both_wrong', 'any_wrong'"),
    ({"ce_label_smoothing": 1.5}, "ce_label_smoothing=1.5", "[0, 1)"),
    ({"synergy_head_dropout": -0.1}, "synergy_head_dropout=-0.1", "[0, 1)"),
    ({"kd_ens_alpha": 2.0}, "kd_ens_alpha=2.0", "[0, 1]"),
    ({"loss_clamp_max": 0.0}, "loss_clamp_max=0.0", "[1e-06, 1e+09]"),
    ({"synergy_ce_alpha": 0.0, "synergy_kd_alpha": 0.0}, "synergy_ce_alpha and synergy_kd_alpha", "nothing to fit"),
    ({"min_cw": 0.0}, "min_cw=0.0", "in (0, 1]"),
    ({"min_cw": 1.5}, "min_cw=1.5", "in (0, 1]"),
    ({"ib_mbm_n_head": 5}, "ib_mbm_n_head=5", "ib_mbm_out_dim=64"),
    ({"ib_mbm_n_head": 0}, "ib_mbm_n_head=0", "at least 1"),
    ({"ib_mbm_feature_norm": "layer"}, "ib_mbm_feature_norm='layer'", "'none', 'l2'"),
    ({"ib_mbm_logvar_clip": 1.0, "ib_mbm_min_std": 2.0}, "ib_mbm_min_std=2.0", "ib_mbm_logvar_clip=1.0"),
    ({"cccp_nt": 0}, "cccp_nt=0", "at least 1"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of the cases' files: data of ten classes of 8x8 pixels, weights, and an earlier run's results."""
    folder = tmp_path_factory.mktemp("files")
    _data_files(folder)
    _pictures(folder / "pictures")
    _weights_files(folder)
    results = folder / "results"
    (results / "earlier").mkdir(parents=True)
    for name in ("summary.csv", "earlier/config.json", "earlier/metrics.json", "earlier/log.txt"):
        (results / name).write_text(f"what an earlier run left in {name}")
    (results / "latest").symlink_to("earlier")
    return folder


def _data_files(folder: pathlib.Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    label = np.arange(60) % 10
    good = {"x_train": image, "y_train": label, "x_test": image[:20], "y_test": label[:20]}
    lonely = np.where(np.arange(60) < 59, np.arange(60) % 9, 9)
    wrong = {
        "objects": {"y_train": label.astype(object)},
        "label_above": {"y_test": label[:20] + 5},
        "label_below": {"y_train": label - 1},
        "label_float": {"y_train": label / 1.0},
        "label_count": {"y_train": label[:59]},
        "flat": {"x_train": image.reshape(60, 64)},
        "float": {"x_train": np.float32(image)},
        "sizes": {"x_test": image[:20, :4, :4]},
        "nan": {"x_test": np.full((20, 8, 8, 1), np.nan, np.float32)},
        "no_images": {"x_train": image[:0]},
        "names": {"class_names": np.arange(10)},
        "lonely": {"y_train": lonely},
        "channels_first": {"x_test": image[:20].reshape(20, 1, 8, 8)},
        "channels": {"x_train": image.repeat(5, -1)},
        "one_class": {"y_train": 0 * label, "y_test": 0 * label[:20]},
        "no_x_val": {"y_val": label},
        "x_val": {"x_val": np.float32(image), "y_val": label},
        "colour": {"x_train": image.repeat(3, -1), "x_test": image[:20].repeat(3, -1)},
        "good": {},
    }
    for name, arrays in wrong.items():
        np.savez(folder / f"{name}.npz", **good | arrays)
    np.savez(folder / "no_labels.npz", **{name: good[name] for name in good if name != "y_test"})
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.npz").write_bytes(whole[:500] + bytes(255 - byte for byte in whole[500:600]) + whole[600:])
    (folder / "empty.npz").touch()
    for name in ("text.npz", "text.safetensors", "text.pth", "file"):
        (folder / name).write_text("this is no archive\n" * 50)
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "folder.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")
    (folder / "unreadable.npz").symlink_to("/proc/self/mem")  # an input/output error for root, too
    with tarfile.open(folder / "whole.tar.gz", "w:gz") as tar:
        tar.add(folder / "good.npz", "cifar-100-python/train")
    whole = (folder / "whole.tar.gz").read_bytes()
    (folder / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])


def _pictures(folder: pathlib.Path) -> None:
    """Six pictures of 8x8 for each of two classes, and what is wrong with them."""
    for name in ("good", "cut", "sizes", "pipe", "alone", "few"):
        for label, count in ("ant", 6), ("bee", {"few": 2, "alone": 0}.get(name, 6)):
            for k in range(count):
                (folder / name / label).mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 10 * k).save(folder / name / label / f"{k}.png")
    picture = folder / "cut" / "ant" / "0.png"
    picture.write_bytes(picture.read_bytes()[:40])
    Image.new("L", (9, 8)).save(folder / "sizes" / "bee" / "1.png")
    os.mkfifo(folder / "pipe" / "ant" / "x.png")


def _weights_files(folder: pathlib.Path) -> None:
    for name, network, classes in (("resnet14", "resnet14", 10), ("resnet8", "resnet8", 10), ("seven", "resnet8", 7)):
        model = KDModel(models.MODELS[network](True), classes, (0.3,), (0.4,))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False))
        state = torch_names.export_weights(random_values(shapes), model.architecture)
        np.savez(folder / f"{name}.npz", **state)
        if name == "resnet8":
            for broken, key, number in (
                ("not_a_number", "conv1.weight", np.nan),
                ("huge", "layer1.0.bn1.weight", 1e38),
                ("below_zero", "bn1.running_var", -1),
            ):
                array = state[key].copy()
                array.flat[0] = number
                np.savez(folder / f"{broken}.npz", **state | {key: array})
            np.savez(folder / "quantised.npz", **state | {"fc.weight": np.ones((10, 64), np.int8)})


def config_of(changes: dict, files: pathlib.Path) -> dict:
    """`configs/l4_full.py:digits`, steadied and changed, with results in a folder that has some already."""
    paths = {
        key: value.replace("FILES", str(files)) if isinstance(value, str) else value for key, value in changes.items()
    }
    tree = changed(l4_full.get_config("digits"), STEADY | {"results_dir": str(files / "results")} | paths)
    return {key: value for key, value in tree.items() if value is not ...}


def begin(config: dict) -> Record:
    """What launch/main.py does until there is a run's folder."""
    recipe = preparation.checked(config)
    preparation.prepare(recipe)
    return Record.create(recipe.results_dir, "run", recipe.exp_id, config)


def contents(folder: pathlib.Path) -> dict:
    """Every file and link below, with its bytes and when it was written."""
    return {path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "changes, words",
    [(case[0], case[1:]) for case in CASES],
    ids=[f"{k}-{','.join(case[0])}" for k, case in enumerate(CASES)],
)
def test_is_refused(changes, words, files, compiled):
    """With a UserError, which all of these are, that says so; nothing compiled, nothing written, nothing touched."""
    before, programs = contents(files / "results"), compiled()
    with pytest.raises(UserError) as caught:
        begin(config_of(changes, files))
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert [word for word in words if word not in told] == [], told
    assert compiled() == programs
    assert contents(files / "results") == before


def test_a_grey_image_has_no_choice_of_lengths(files):
    three = recipe.read(config_of({"teacher2.std": (0.2, 0.2, 0.2)}, files))
    with pytest.raises(UserError, match="the images have 1 channels: give one value$"):
        checks.check_data(three, (8, 8, 1), 10)
    with pytest.raises(UserError, match="the images have 2 channels: give one value, or 2$"):
        checks.check_data(three, (8, 8, 2), 10)


def test_enough_cases():
    assert len(CASES) >= 60 and len({str(case) for case in CASES}) == len(CASES)


def test_what_is_right_begins(files, compiled, tmp_path, monkeypatch):
    """Without the change, or with files that fit; a program is seen where one is compiled. A ~ is the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    programs = compiled()
    given = {
        "platform": jax.default_backend(),
        "num_devices": 2,
        "model.student.weights": "FILES/resnet8.npz",
        "teacher1.name": "resnet8",
        "teacher1.weights": "FILES/seven.npz",
    }
    for changes in ({}, npz("good") | STUDENT | FINETUNED | given):
        record = begin(config_of(changes | {"results_dir": "~/runs"}, files))
        assert record.folder.parent == tmp_path / "runs"
        assert json.loads((record.folder / "config.json").read_text())["seed"] == 0
    assert compiled() == programs
    jax.block_until_ready(jax.jit(lambda x: x * 12345.678 + len(str(tmp_path)))(jnp.ones(3)))
    assert compiled() > programs


def test_no_number_escapes_by_not_being_one(files):
    """Every floating-point key, teachers' among them, alone or in a tuple."""
    read = recipe.read(config_of({}, files))
    numbers = {
        key: value
        for key, value in flat(read).items()
        if isinstance(value, float) or (isinstance(value, tuple) and any(isinstance(v, float) for v in value))
    }
    assert len(numbers) >= 59
    for key, value in numbers.items():
        nan = (*value[:-1], float("nan")) if isinstance(value, tuple) else float("nan")
        with pytest.raises(UserError, match=f"^{key}=.*nan.* must be finite$"):
            checks.check(recipe.read(config_of({key: nan}, files)))


def test_no_number_is_beyond_what_float32_bears(files):
    """1e30 is no weight, rate, temperature, exponent or share; it is memory or time."""
    read = recipe.read(config_of({}, files))
    numbers = {key: value for key, value in flat(read).items() if isinstance(value, float)}
    numbers |= {"tau_schedule": 0.0, "beta_schedule": 0.0, "teacher_lr": 0.0, "teacher_adapt_alpha_kd": 0.0}
    unbounded = set()
    for key in numbers:
        value = {"tau_schedule": (2.0, 1e30), "beta_schedule": (0.0, 1e30, 1.0)}.get(key, 1e30)
        try:
            keys.check(recipe.read(config_of({key: value}, files)))
        except UserError as error:
            assert str(error).startswith(f"{key}=") and "must be in " in str(error)
        else:
            unbounded.add(key)
    assert unbounded == {"device_data_gb", "checkpoint_minutes", "ib_mbm_min_std"}  # the last is checked with its clip


def test_shipped_configs_never_trip_over_their_warm_up():
    """Every one under every profile that it has; where only files of weights are missing, this one stands for them."""
    found = 0
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        for profile in ("", "small", "digits") if hasattr(module, "get_config") else ():
            try:
                config = module.get_config(profile)
            except ValueError as error:
                assert "unknown profile" in str(error) and profile
                continue
            if profile == "small" and not config.teacher1.train_epochs:
                config.teacher1.weights = config.teacher2.weights = __file__
            checks.check(recipe.read(config))
            found += 1
    assert found == 12 * 3 + 8  # base, the ladder and specialists; fine-tuning, at full scale alone


def test_the_lock_of_a_dead_process_locks_nothing(tmp_path):
    """Killed while it held the lock of summary.csv: its file is still there."""
    lock = tmp_path / "results" / ".summary.csv.lock"
    lock.parent.mkdir()
    program = f"import fcntl, os; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert lock.exists()
    record = Record.create(tmp_path / "results", "run", "after", {"seed": 0})
    record.finish("finished", {"test_acc_last": 0.5})
    assert "after,run,finished" in (tmp_path / "results" / "summary.csv").read_text()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and it is free again


# --- the scripts -----------------------------------------------------------------------------------------------------

DIGITS = "--config=configs/l2_cccp.py:digits"
SCRIPTS = [
    ("main", ["--sede=1", DIGITS], "'sede'"),
    ("main", [DIGITS, "--config.dataset.pth=1"], "unknown key", "'pth'", 'Did you mean "path"'),
    ("main", [DIGITS, "--config.seed=x"], "--config.seed=x", "int"),
    ("main", ["--config=missing.py", "--config.seed=1"], "--config=missing.py", "No such file"),
    ("main", ["--config=configs/l2_cccp.py:tiny"], "l2_cccp.py:tiny", "'tiny'", "['', 'digits', 'own', 'small']"),
    ("main", ["--config=FILES/wrong.py"], "NameError", "name 'digits' is not defined", "/wrong.py, line 2"),
    ("main", ["--config=FILES/none.py"], "none.py", "returned None"),
    ("main", ["--config=FILES/exits.py"], "exits.py: SystemExit: no data today", "/exits.py, line 2"),
    ("main", ["--config=FILES/results/earlier/config.json"], "a config is a .py file", "--config.resume=RUN"),
    ("main", [DIGITS, "--config.dataset=npz"], "dataset is a group of keys; set dataset.name"),
    ("main", [DIGITS, "--config.teacher1=resnet20"], "teacher1 is a group of keys; set teacher1.name"),
    ("main", [DIGITS, "--config.teacher3.name=resnet20"], "'teacher3'; teachers are added in a config file"),
    ("main", ["--config=FILES/without.py"], "without.py: it has no get_config(profile)"),
    ("main", ["FILES/without.py"], "without.py: it has no get_config(profile)"),
    ("main", ["--config=FILES/three.py"], "three.py: its get_config returned a value of type int"),
    ("main", ["--config=FILES/profile.py:digits"], "profile.py:digits: get_config() takes 0", "get_config(profile)"),
    ("main", ["--config=FILES/results"], "results: [Errno 21] Is a directory"),
    ("main", [DIGITS, "seed=1"], "['seed=1']: --config is given already", "--config.KEY=VALUE"),
    ("main", [], "--config is missing", "configs/l2_cccp.py:digits"),
    ("main", ["configs/l2_cccp.py:digits", DIGITS], "['configs/l2_cccp.py:digits']: --config is given already"),
    ("main", ["--dry_run", "configs/l2_cccp.py:digits", "--config.tau=0.0"], "tau=0.0"),
    ("main", ["--config.kd_target", "mean", "l2_cccp:digits"], "kd_target='mean'"),
    ("evaluate", [], "--run is missing", "results/latest"),
    ("evaluate", ["FILES/results/nothing"], "results/nothing is no run folder"),
    ("evaluate", ["FILES/results/nothing", "other"], "['other']: --run is given already"),
    ("export", ["--student", "last", "FILES/results/nothing"], "results/nothing is no run folder"),
    ("benchmark", ["--synthetic", "l2_cccp:digits", "--config.kd_target=mean"], "kd_target='mean'"),
    ("check_devices", ["gpu"], "unexpected arguments ['gpu']; flags are written"),
    ("main", ["--config.seed=x", DIGITS], "--config.seed=x", "int"),
    ("main", ["--config.seed=x", "-config", "l2_cccp.py:digits"], "--config.seed=x", "int"),
    ("main", [DIGITS, "--config=configs/ce_only.py"], "--config is given twice"),
    ("main", ["--dry_run", ""], "--config is missing", "configs/l2_cccp.py:digits"),
    ("main", ["--dry_run", "--", "FILES/three.py"], "three.py: its get_config returned a value of type int"),
    ("main", ["--config.use_amp", "l2_cccp:digits"], "--config is missing"),
    ("main", ["l2_ccc:digits"], "'l2_ccc'; there are base, ", ", l2_cccp, "),
    ("main", ["FILES/col:on.py:digits"], "/col'; what follows the first colon is the profile"),
    ("main", ["FILES/zero.py"], "zero.py: source code string cannot contain null bytes"),
    ("main", [DIGITS, "--config.student_epochs_per_stage=(1,"], "flag --config.student_epochs_per_stage=(1,"),
    ("main", ["l2_cccp:digits", "--config.results_dir=FILES/odd"], "odd/teachers is no folder"),
    ("evaluate", ["--run="], "--run is missing", "results/latest"),
    ("export", ["--run=one", "-run", "two"], "--run is given twice"),
    ("benchmark", [DIGITS, "--seconds=nan"], "--seconds=nan must be finite"),
    ("main", [DIGITS, "--config.dataset.name=npz", "--config.dataset.path=FILES/label_above.npz"], "y_test", "0..9"),
    ("main", [DIGITS, "--config.exp_id=earlier", "--dry_run"], "exp_id='earlier'", "exists"),
    ("main", [DIGITS, "--coordinator=there", "--processes=2"], "--coordinator=there", "HOST:PORT"),
    ("evaluate", ["--run=FILES/results/nothing"], "results/nothing", "is no run folder"),
    ("export", ["--run=FILES/results/nothing", "--format=onnx"], "--format=onnx", "safetensors"),
    ("benchmark", [DIGITS, "--synthetic", "--json=FILES/nowhere/x.json"], "--json=", "nowhere is no folder"),
    ("benchmark", [DIGITS, "--config.kd_target=mean"], "kd_target='mean'", "'weighted_conf'"),
    ("check_devices", ["--expect=64"], "--expect=64", "jax sees 4"),
]


def errors(told: subprocess.CompletedProcess) -> list[str]:
    return [line for line in told.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    "script, arguments, words",
    [(case[0], case[1], case[2:]) for case in SCRIPTS],
    ids=[f"{case[0]}-{k}" for k, case in enumerate(SCRIPTS)],
)
def test_a_script_says_so_once(script, arguments, words, files):
    (files / "wrong.py").write_text("def get_config(profile=''):\n    return digits\n")
    (files / "none.py").write_text("def get_config(profile=''):\n    pass\n")
    (files / "without.py").write_text("seed = 1\n")
    (files / "three.py").write_text("def get_config(profile=''):\n    return 3\n")
    (files / "profile.py").write_text("def get_config():\n    return 3\n")
    (files / "zero.py").write_text("seed = '\0'\n")
    (files / "col:on.py").write_text("seed = 1\n")
    (files / "odd").mkdir(exist_ok=True)
    (files / "odd" / "teachers").touch()
    (files / "exits.py").write_text("import sys\nsys.exit('no data today')\n")
    given = [argument.replace("FILES", str(files)) for argument in arguments]
    if script == "main" and DIGITS in given:
        given.append(f"--config.results_dir={files / 'results'}")
    before = contents(files / "results")
    ended = launch(script, *given)
    assert ended.returncode == 2, ended.stderr
    assert len(errors(ended)) == 1 and "Traceback" not in ended.stderr + ended.stdout
    assert [word for word in words if word not in errors(ended)[0]] == [], ended.stderr
    assert contents(files / "results") == before


def test_a_folder_that_is_gone_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ended = subprocess.run(
        [sys.executable, ROOT / "launch" / "evaluate.py", "results/latest"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and "the folder that this was started in is gone" in ended.stderr


def test_verbose_shows_where():
    ended = launch("main", DIGITS, "--config.kd_target=mean", "--verbose")
    assert ended.returncode == 2 and len(errors(ended)) == 1
    assert "Traceback" in ended.stderr and "in check" in ended.stderr


@pytest.mark.parametrize(
    "flags, mistake, status, error",
    [
        ([], "1 / 0", 1, "ZeroDivisionError: division by zero"),
        (["--verbose"], "1 / 0", 1, "ZeroDivisionError: division by zero"),
        ([], "open('nothing')", 2, "[Errno 2] No such file or directory: 'nothing'"),
    ],
)
def test_a_mistake_of_ours_has_another_status(flags, mistake, status, error, tmp_path):
    """Without a traceback, but with a word on how to get one."""
    (tmp_path / "script.py").write_text(
        f"from asib_jax.tools import command_line\ncommand_line.run(lambda: {mistake})\n"
    )
    ended = launch(tmp_path / "script", *flags)
    assert ended.returncode == status and errors(ended) == [f"error: {error}"]
    assert ("Traceback" in ended.stderr) == bool(flags) and ("--verbose" in ended.stderr) == (status == 1)


def test_what_libraries_say_is_shown_from_warnings_on():
    """As jax does, through absl, of every kind of device that is not here."""
    program = (
        "from absl import logging; from asib_jax.tools import command_line; "
        "command_line.run(lambda: (logging.info('of no use'), logging.warning('of use')))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "of use" in ended.stderr and "of no use" not in ended.stderr


IN_TMPFS = """mount -t tmpfs -o size=300k tmpfs "$0" && mkdir "$0/earlier"
head -c "$1" /dev/urandom > "$0/earlier/file"; before=$(sha256sum "$0/earlier/file"); shift; "$@"; status=$?
[ "$before" = "$(sha256sum "$0/earlier/file")" ] && ls -A "$0" && cat "$0/summary.csv"; exit $status"""


@pytest.fixture
def disk(tmp_path):
    """Train the student alone for an epoch, with results in a file system of 300 KB, of which so many are in use."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare to mount a small file system")

    def run(used: str) -> subprocess.CompletedProcess:
        return launch_process(
            "main",
            "--config=configs/ce_only.py:digits",
            f"--config.results_dir={tmp_path}",
            "--config.exp_id=run",
            "--config.student_epochs_per_stage=(1,)",
            "--config.schedule.lr_warmup_epochs=1",
            "--config.train_control=False",
            shell=("unshare", "-rm", "sh", "-c", IN_TMPFS, str(tmp_path), used),
        )

    return run


def test_a_full_results_folder(disk):
    """Of half a run's folder nothing stays, and what was there does."""
    ended = disk("300k")
    assert ended.returncode == 2 and ended.stdout.split() == ["earlier"] and "Traceback" not in ended.stderr
    assert "results_dir=" in errors(ended)[0] and "No space left" in errors(ended)[0]


@pytest.mark.slow
def test_a_results_folder_that_fills_up(disk):
    """When the first checkpoint is written: the run is on record as failed, with the reason."""
    ended = disk("0")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    (error,) = errors(ended)
    assert "cannot be written: No space left on device. Make room: with --resume the run " in error
    row = next(line for line in ended.stdout.splitlines() if line.startswith("run,"))
    assert row.startswith("run,ce_only_digits_0,failed,0,") and "No space left" in row


def test_a_quota_is_met(tmp_path):
    """No file may be longer than 512 bytes, which a run's configuration is."""
    ended = launch_process(
        "main", DIGITS, f"--config.results_dir={tmp_path}", shell=("sh", "-c", 'ulimit -f 1; exec "$@"', "sh")
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "results_dir=" in errors(ended)[0] and "File too large" in errors(ended)[0]
    assert not list(tmp_path.iterdir())
