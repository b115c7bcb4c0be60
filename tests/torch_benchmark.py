"""The PyTorch side of `launch/benchmark.py --vs_torch`: torch_asib's steps with a run's networks, data and settings."""

import importlib.util
import re
import time
from collections.abc import Callable

import numpy as np
import torch
import torch_networks
from torch_asib import ASIB, Settings

from asib_jax.data.parts import Data
from asib_jax.recipe import Recipe

_WINDOWS = {0: {"pad": 0, "flip": False}, 1: {"flip": True}, 3: {"flip": False}}  # data_aug: options of ASIB
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FIXED = {
    "use_ib": True,
    "use_cccp": True,
    "kd_target": "synergy",
    "optimizer": "adamw",
    "student_feature": "distill_feat",
    "ib_mbm_feature_norm": "none",
    "ib_mbm_residual": True,
    "kv": "feat",
    "teacher_adapt_alpha_kd": None,
    **dict.fromkeys(
        (
            "feat_kd_alpha",
            "reg_lambda",
            "ib_mbm_reg_lambda",
            "label_smoothing",
            "ce_label_smoothing",
            "kd_ens_alpha",
            "use_loss_clamp",
            "use_disagree_weight",
            "mixup_alpha",
            "cutmix_alpha_distill",
            "distill_hidden_dim",
            "use_partial_freeze",
            "student_freeze_bn",
            "train_distill_adapter_only",
            "use_teacher_finetuning",
            "synergy_head_dropout",
            "ib_mbm_teacher_dropout",
            "synergy_temp_learnable",
            "a_step_weight_decay",
        ),
        0,
    ),
}


def check(recipe: Recipe, devices: int) -> None:
    """ValueError for a recipe whose steps, networks or devices the PyTorch version has not."""
    for key, value in _FIXED.items():
        if getattr(recipe, key) != value:
            raise ValueError(f"--vs_torch: {key}={getattr(recipe, key)!r}, but the PyTorch version has {value!r} only")
    if recipe.model.student.use_adapter or not recipe.grad_clip_norm or "convnext" in recipe.model.student.name:
        raise ValueError(
            "--vs_torch: the PyTorch version has no residual adapter, always clips (grad_clip_norm), and "
            "its ConvNeXt has no stochastic depth: set model.student and grad_clip_norm accordingly"
        )
    names = [_plain(network.name) for network in (recipe.model.student, *recipe.teachers)]
    for key, value, choices in (
        ("dataset.data_aug", recipe.dataset.data_aug, _WINDOWS),
        ("amp_dtype", recipe.compute_dtype, _DTYPES),
        ("num_devices", devices, (1,)),
        *(("a network's name", name, torch_networks.NAMED) for name in names),
    ):
        if value not in choices:
            raise ValueError(f"--vs_torch: {key} is {value!r}; the PyTorch version has {', '.join(map(str, choices))}")
    if any(name.startswith("convnext") for name in names) and importlib.util.find_spec("timm") is None:
        raise ValueError("--vs_torch: PyTorch's ConvNeXt is timm's: pip install timm")
    if len(recipe.model.student.mean) not in (0, 3):  # 0: the data tell
        raise ValueError(
            f"--vs_torch: the PyTorch networks read colour images, which dataset.name={recipe.dataset.name!r} has not"
        )


def _plain(name: str) -> str:
    return re.sub(r"_(scratch|pretrain)$", "", name)


def works(recipe: Recipe, data: Data, platform: str) -> dict[str, Callable[[float], int]]:
    """ "torch_a" and "torch_b": functions that train for about so many seconds, one step at least, and return on how
    many images. platform: jax's name of it."""
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in ours

    def network(options):
        backbone = torch_networks.by_name(_plain(options.name), recipe.dataset.small_input, data.num_classes)
        return backbone, options.mean, options.std

    device = "cuda" if platform == "gpu" else platform
    images, labels = torch.tensor(np.asarray(data.train.image)), torch.tensor(data.train.label, dtype=torch.int64)
    asib = ASIB(
        network(recipe.model.student),
        [network(teacher) for teacher in recipe.teachers],
        data.num_classes,
        images,
        labels,
        device=device,
        dtype=_DTYPES[recipe.compute_dtype],
        settings=Settings(**{name: getattr(recipe, name) for name in Settings._fields}),
        **_WINDOWS[recipe.dataset.data_aug],
    )

    def training(step: Callable, **controls) -> Callable[[float], int]:
        def work(seconds: float) -> int:
            end, losses, size = time.perf_counter() + seconds, [], recipe.dataset.batch_size
            while not losses or time.perf_counter() < end:
                order = torch.randperm(len(labels), device=device)
                for rows in order[: len(labels) // size * size].view(-1, size):
                    losses.append(step(rows, tau=recipe.tau, **controls)[0])
                    if time.perf_counter() >= end:
                        break
            if not torch.stack(losses).isfinite().all():
                raise FloatingPointError("a loss of the PyTorch version is not finite")
            if device == "cuda":
                torch.cuda.synchronize()
            return size * len(losses)

        return work

    return {
        "torch_a": training(asib.a_step, lr=recipe.a_step_lr, beta=recipe.ib_beta, student_open=True, certain=True),
        "torch_b": training(asib.b_step, lr=recipe.student_lr, gate=True),
    }
