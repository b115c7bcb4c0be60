"""ASIB's A-Step and B-Step in eager PyTorch, as configs/l2_cccp.py sets them: what the JAX package is timed against.

Written to be fast in the ways a PyTorch user has without leaving eager mode: the images stay on the device as uint8 and
a whole batch is cropped and mirrored at once; networks are channels_last; what stands still runs under `no_grad` and
has its weights in the compute type beforehand; AdamW is the fused one; no step waits for the device. Left to the
caller, because they are global: `torch.backends.cudnn.benchmark = True` and TensorFloat-32.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Settings(NamedTuple):
    """The keys of configs/base.py that the steps need, as configs/l2_cccp.py sets them."""

    ce_alpha: float = 0.65
    kd_alpha: float = 0.35
    kd_max_ratio: float = 2.0
    synergy_ce_alpha: float = 0.6
    synergy_kd_alpha: float = 1.0
    cccp_alpha: float = 0.25
    tau: float = 4.0  # of CCCP; everything else takes the schedule's
    min_cw: float = 0.1
    distill_out_dim: int = 512
    ib_mbm_out_dim: int = 512
    ib_mbm_n_head: int = 4
    ib_mbm_logvar_clip: float = 6.0
    ib_mbm_min_std: float = 1e-3
    ib_mbm_lr_factor: float = 10.0  # of IB_MBM and head
    student_weight_decay: float = 3e-4
    grad_clip_norm: float = 0.5
    base: str = "none"  # synergy_base


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class KDNetwork(nn.Module):
    """Pixels [B, C, H, W] in 0..255 -> feat_2d [B, F] and logits [B, classes], float32; and the distillation adapter.

    backbone: any network from normalised images to logits that ends in a linear classifier, e.g. torch_networks' or
        torchvision's; feat_2d is what its last linear layer reads (with dropout before that: what it leaves).
    mean, std: of pixels in 0..1, one value or one per channel. dtype: the backbone's, float32 or bfloat16 (autocast).
    """

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        adapter_dim: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.backbone, self.dtype = backbone, dtype
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        classifier = [module for module in backbone.modules() if isinstance(module, nn.Linear)][-1]
        classifier.register_forward_pre_hook(self._keep)
        width = classifier.in_features
        self.adapter = mlp(width, max(width // 2, adapter_dim), adapter_dim)

    def _keep(self, classifier: nn.Linear, inputs: tuple[torch.Tensor]) -> None:
        self._feature = inputs[0]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normalised = torch.addcmul(self.shift, pixels, self.scale)
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.backbone(normalised)
        feature, self._feature = self._feature, None
        return feature.float(), logits.float()


class IB_MBM(nn.Module):
    """q [B, D], kv [B, T, D] -> mu, logvar [B, d]: the student's feature asks, the teachers' answer."""

    def __init__(self, s: Settings):
        super().__init__()
        dim = s.ib_mbm_out_dim
        self.bounds = max(-s.ib_mbm_logvar_clip, 2 * math.log(s.ib_mbm_min_std)), s.ib_mbm_logvar_clip
        self.query, self.teachers = nn.Linear(s.distill_out_dim, dim), nn.Linear(s.distill_out_dim, dim)
        self.query_norm, self.teachers_norm, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = nn.MultiheadAttention(dim, s.ib_mbm_n_head, batch_first=True)
        self.mu, self.logvar = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, kv = self.query(q), self.teachers_norm(self.teachers(kv))
        read, _ = self.attention(self.query_norm(q)[:, None], kv, kv, need_weights=False)
        s = self.norm(read[:, 0] + q)
        return self.mu(s), self.logvar(s).clamp(*self.bounds)


def kd(logits: torch.Tensor, target: torch.Tensor, tau: float) -> torch.Tensor:
    """tau^2 KL(softmax(target / tau) || softmax(logits / tau)): [B]."""
    log_p, log_q = (F.log_softmax(x / tau, dim=-1) for x in (target, logits))
    return tau**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def certainty_weight(logvar: torch.Tensor, minimum: float) -> torch.Tensor:
    """The code's precision relative to the batch's mean, clipped, without gradient: [B]."""
    precision = torch.exp(-logvar.detach().mean(-1))
    return (precision / precision.mean()).clamp(minimum, 1 / minimum)


class ASIB(nn.Module):
    """The networks, the training images and both optimisers.

    student, teachers: (backbone, mean, std), as of KDNetwork. images: [N, H, W, C] uint8; labels: [N] int64.
    pad, flip: the training windows; None: H // 8. dtype: of the backbones, float32 or bfloat16 (autocast).

    `a_step` and `b_step` are whole training steps on the images of `rows` ([B], on the device); they return the loss
    and the batch's accuracy (of synergy, of the student) as scalars on the device.
    """

    def __init__(
        self,
        student: tuple,
        teachers: Sequence[tuple],
        classes: int,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        device: str,
        dtype: torch.dtype = torch.float32,
        pad: int | None = None,
        flip: bool = True,
        settings: Settings = Settings(),
    ):
        super().__init__()
        s = self.settings = settings
        self.student = KDNetwork(*student, s.distill_out_dim, dtype)
        self.teachers = nn.ModuleList(KDNetwork(*teacher, s.distill_out_dim, dtype) for teacher in teachers)
        self.ib_mbm, self.head = IB_MBM(s), mlp(s.ib_mbm_out_dim, s.ib_mbm_out_dim, classes)
        self.router = nn.Linear(s.ib_mbm_out_dim, len(teachers)) if s.base == "mixture" else nn.Identity()
        if s.base != "none":
            for layer in (self.head[-1], *([self.router] if s.base == "mixture" else [])):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)
        self.to(device, memory_format=torch.channels_last)
        self.teachers.eval().requires_grad_(False)
        for module in (module for teacher in self.teachers for module in teacher.backbone.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)  # else autocast converts their weights in every step
        height, width = images.shape[1:3]
        pad = height // 8 if pad is None else pad
        padded = F.pad(images.to(device), (0, 0, pad, pad, pad, pad))
        self.windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view: [N, 2 pad + 1, 2 pad + 1, C, H, W]
        self.labels, self.flip = labels.to(device), flip
        backbone = list(self.student.backbone.parameters())
        self.a_optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for part in (self.ib_mbm, self.head, self.router) for p in part.parameters()],
                    "factor": s.ib_mbm_lr_factor,
                },
                {"params": list(self.student.adapter.parameters()), "factor": 1.0},
            ],
            weight_decay=0.0,
            fused=True,
        )
        self.b_optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in backbone if p.ndim > 1], "weight_decay": s.student_weight_decay, "factor": 1.0},
                {"params": [p for p in backbone if p.ndim <= 1], "weight_decay": 0.0, "factor": 1.0},
            ],
            fused=True,
        )

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A random window of each of these images padded with zeros, mirrored half of the time, and the labels."""
        top, left = torch.randint(self.windows.shape[1], (2, len(rows)), device=rows.device)
        pixels = self.windows[rows, top, left]
        if self.flip:
            mirrored = torch.rand(len(rows), 1, 1, 1, device=rows.device) < 0.5
            pixels = torch.where(mirrored, pixels.flip(3), pixels)
        return pixels, self.labels[rows]

    @torch.no_grad()
    def read_teachers(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teachers' adapted features [B, T, D] and their logits [B, T, classes]."""
        features, logits = zip(*(teacher(pixels) for teacher in self.teachers))
        adapted = [teacher.adapter(feature) for teacher, feature in zip(self.teachers, features)]
        return torch.stack(adapted, dim=1), torch.stack(logits, dim=1)

    def synergy(self, z: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The head's output on z [B, d], added to the base of the teachers' logits [B, T, classes]: [B, classes]."""
        if self.settings.base == "none":
            return self.head(z)
        logs = F.log_softmax(logits, dim=-1)
        if self.settings.base == "avg":
            return self.head(z) + logs.mean(1)
        return self.head(z) + torch.logsumexp(F.log_softmax(self.router(z), dim=-1)[..., None] + logs, dim=1)

    def a_loss(self, pixels, labels, noise, *, tau: float, beta: float, student_open: bool, certain: bool):
        """The A-Step's loss, and the synergy logits. noise: [B, d] standard normal.

        student_open: the gate of the terms towards the student; certain: False in the synergy-only epochs.
        """
        s = self.settings
        with torch.no_grad():
            feature, student = self.student.eval()(pixels)
        kv, teachers = self.read_teachers(pixels)
        mu, logvar = self.ib_mbm(self.student.adapter(feature), kv)
        logits = self.synergy(mu + torch.exp(logvar / 2) * noise, teachers)
        per_sample = s.synergy_ce_alpha * F.cross_entropy(logits, labels, reduction="none") + s.synergy_kd_alpha * kd(
            logits, teachers.mean(1), tau
        )
        if student_open:
            per_sample = per_sample + s.kd_alpha * kd(logits, student, tau)
        if certain:
            per_sample = per_sample * certainty_weight(logvar, s.min_cw)
        gaussian_kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)
        loss = (per_sample + beta * gaussian_kl).mean()
        if student_open:
            loss = loss + s.cccp_alpha * kd(logits, student, s.tau).mean()
        return loss, logits

    def b_loss(self, pixels, labels, *, tau: float, gate: bool):
        """The B-Step's loss, and the student's logits. gate: distil from synergy, else from the teachers' average."""
        s = self.settings
        feature, logits = self.student.train()(pixels)
        kv, teachers = self.read_teachers(pixels)
        with torch.no_grad():
            mu, logvar = self.ib_mbm(self.student.adapter(feature), kv)
            target = self.synergy(mu, teachers) if gate else teachers.mean(1)
            weight = certainty_weight(logvar, s.min_cw)
        ce, per_sample = F.cross_entropy(logits, labels), kd(logits, target, tau)
        bound = s.kd_max_ratio * ce.detach()
        ratio = bound / torch.maximum(per_sample.detach().mean(), bound).clamp(min=1e-12)
        distilled = (weight / weight.mean() * per_sample).mean()
        return s.ce_alpha * ce + ratio * s.kd_alpha * distilled, logits

    def a_step(self, rows: torch.Tensor, *, lr: float, noise: torch.Tensor | None = None, **controls):
        """One A-Step at learning rate `lr`; noise, controls: as of `a_loss`, noise drawn here unless given."""
        pixels, labels = self.batch(rows)
        if noise is None:
            noise = torch.randn(len(rows), self.settings.ib_mbm_out_dim, device=rows.device)
        return self._update(self.a_optimizer, lr, labels, *self.a_loss(pixels, labels, noise, **controls))

    def b_step(self, rows: torch.Tensor, *, lr: float, **controls):
        """One B-Step at learning rate `lr`; controls: as of `b_loss`."""
        pixels, labels = self.batch(rows)
        return self._update(self.b_optimizer, lr, labels, *self.b_loss(pixels, labels, **controls))

    def _update(self, optimizer, lr, labels, loss, logits) -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, self.settings.grad_clip_norm)
        optimizer.step()
        return loss.detach(), (logits.argmax(-1) == labels).float().mean()

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> dict[str, float]:
        """Accuracies of the student, the teachers' average and the synergy ensemble on images like the training's."""
        correct = torch.zeros(3, device=self.labels.device)
        for pixels, label in zip(images.split(batch_size), labels.split(batch_size)):
            pixels, label = pixels.to(correct.device).permute(0, 3, 1, 2), label.to(correct.device)
            feature, student = self.student.eval()(pixels)
            kv, teachers = self.read_teachers(pixels)
            mu, _ = self.ib_mbm(self.student.adapter(feature), kv)
            answers = torch.stack([student, teachers.mean(1), self.synergy(mu, teachers)])
            correct += (answers.argmax(-1) == label).sum(-1)
        return dict(zip(("student", "average", "synergy"), (correct / len(labels)).tolist()))
