"""The synergy ensemble: teachers, the student's query, IB_MBM and head, each network run once per batch (SPEC 1).

Variables of all networks live in two dicts, parameters and batch statistics, under the names "student", "teacher1",
"teacher2", ..., "ib_mbm" and "synergy_head".
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax import streams
from asib_jax.models.ib_mbm import IB_MBM, Latent, SynergyHead
from asib_jax.models.kd_model import KDModel, Outputs, feature_dim, in_compute_type, key_feature, known
from asib_jax.models.pools import log_probabilities


class Variables(NamedTuple):
    """Parameters and batch statistics of all networks, by name."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]

    def of(self, name: str) -> dict[str, Any]:
        """What `apply` of the network called `name` takes."""
        return {"params": self.params[name], "batch_stats": self.batch_stats.get(name, {})}

    def only(self, names: Collection[str]) -> "Variables":
        """Those of the networks with these names."""
        return Variables(*({name: own for name, own in part.items() if name in names} for part in self))


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a network runs: `train`, and the partial freezing of SPEC 6. The default is evaluation."""

    train: bool = False
    frozen_stages: int = 0
    freeze_bn: bool = False


EVALUATION = Mode()


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a run. Without a fusion network `ib_mbm` and `synergy_head` are None.

    student_feature: "distill_feat" or "feat_2d", the query and what feature KD matches.
    folds: how many copies stand for each teacher, "teacher1_fold1", ..., each trained without one fold of the images
    (SPEC 13); under "teacher1" is then what they share, its adapter; 0: there are none. deploys_all: under "teacher1"
    is one more network, trained on all images, which is what is measured.
    """

    student: KDModel
    teachers: tuple[KDModel, ...] = ()
    ib_mbm: IB_MBM | None = None
    synergy_head: SynergyHead | None = None
    student_feature: str = "feat_2d"
    folds: int = 0
    deploys_all: bool = False

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return tuple(f"teacher{k}" for k in range(1, len(self.teachers) + 1))

    @property
    def backbone_names(self) -> tuple[str, ...]:
        """The variables that hold teachers' backbones: of every copy, or the teachers themselves."""
        copies = [fold_name(name, fold) for name in self.teacher_names for fold in range(self.folds)]
        return (*copies, *self.teacher_names) if self.deploys_all or not self.folds else tuple(copies)

    @property
    def known(self) -> np.ndarray:
        """Which teacher knows which class, [T, C] of bool; logits do not tell: one that is known may overflow."""
        return np.array([known(teacher) for teacher in self.teachers], bool).reshape(-1, self.student.num_classes)

    @property
    def covered(self) -> np.ndarray:
        """Which classes some teacher knows: [C] of bool."""
        return np.logical_or.reduce(self.known, axis=0)

    @property
    def query_dim(self) -> int:
        """The width of `query`."""
        student = self.student
        return student.adapter_dim if self.student_feature == "distill_feat" else student.architecture.feat_dim


def with_narrow_teachers(nets: Networks, variables: Variables) -> Variables:
    """The variables with the teachers' as `in_compute_type` holds them, for teachers that stand still."""
    narrow = {
        name: in_compute_type(model, variables.of(name))["params"]
        for name, model in zip(nets.teacher_names, nets.teachers, strict=True)
    }
    return variables._replace(params=variables.params | narrow)


def fold_name(teacher: str, fold: int) -> str:
    """What the variables are called of the copy that does without a fold (from 0)."""
    return f"{teacher}_fold{fold + 1}"


def of_copies(nets: Networks, variables: Variables, deployed: bool) -> tuple[Variables, ...]:
    """The teachers' variables, under their own names, as each copy has them; `variables` alone where there are none.

    deployed: as they are measured, else as they are read on training images.
    """
    if not nets.folds or (deployed and nets.deploys_all):
        return (variables.only(nets.teacher_names),)
    return tuple(
        Variables(
            {
                name: variables.params[fold_name(name, fold)] | _adapter(variables.params[name])
                for name in nets.teacher_names
            },
            {name: variables.batch_stats.get(fold_name(name, fold), {}) for name in nets.teacher_names},
        )
        for fold in range(nets.folds)
    )


def _adapter(params: Mapping[str, Any]) -> dict[str, Any]:
    return {child: leaves for child, leaves in params.items() if child == "distill_adapter"}


class TeacherOutputs(NamedTuple):
    """What the teachers say of a batch, before any adapter: feats, one [B, F_k] per teacher, in its compute type;
    logits [B, T, C], float32, -inf where a teacher does not know the class (`Networks.known`)."""

    feats: tuple[jax.Array, ...]
    logits: jax.Array


class StudentOutputs(NamedTuple):
    """What the student says of a batch in evaluation, before any adapter: feat [B, F] in its compute type, logit [B, C]
    float32."""

    feat: jax.Array
    logit: jax.Array


def run_network(
    model: KDModel, variables: Mapping[str, Any], pixels: jax.Array, mode: Mode, dropout_keys: jax.Array | None = None
) -> tuple[Outputs, Any]:
    """One forward pass: outputs, and batch statistics (the same ones in evaluation).

    dropout_keys: [B] keys, one per example; only training takes them.
    """
    outputs, changed = model.apply(
        variables,
        pixels,
        **dataclasses.asdict(mode),
        mutable=["batch_stats"],
        dropout_keys=dropout_keys if mode.train else None,
    )
    return outputs, changed.get("batch_stats", {})  # a network without BatchNorm has none


def run_teachers(
    nets: Networks,
    variables: Variables,
    pixels: jax.Array,
    modes: tuple[Mode, ...] = (),
    dropout_keys: jax.Array | None = None,
) -> tuple[TeacherOutputs, dict[str, Any]]:
    """Every teacher on `pixels` [B, H, W, ch], in evaluation unless `modes` says otherwise, and its statistics.

    dropout_keys: [B] keys, from which each teacher in training takes its own.
    """
    feats, logits, stats = [], [], {}
    for k, (name, teacher) in enumerate(zip(nets.teacher_names, nets.teachers)):
        keys = None if dropout_keys is None else streams.branch(dropout_keys, name)
        outputs, stats[name] = run_network(teacher, variables.of(name), pixels, modes[k] if modes else EVALUATION, keys)
        feats.append(outputs.feat_2d.astype(teacher.dtype))  # as they are stored, so that storing changes nothing
        logits.append(outputs.logit)
    return TeacherOutputs(tuple(feats), jnp.stack(logits, axis=1)), stats


def run_student(nets: Networks, variables: Variables, pixels: jax.Array, name: str = "student") -> StudentOutputs:
    """The student, whose variables are called `name`, on `pixels` [B, H, W, ch] in evaluation."""
    outputs, _ = run_network(nets.student, variables.of(name), pixels, EVALUATION)
    return StudentOutputs(outputs.feat_2d.astype(nets.student.dtype), outputs.logit)


def keys_and_values(nets: Networks, variables: Variables, teachers: TeacherOutputs) -> jax.Array:
    """What IB_MBM reads [B, T, Dk]: the teachers by their `key_feature`, through their distillation adapters where they
    have one."""
    read = []
    for k, (name, teacher) in enumerate(zip(nets.teacher_names, nets.teachers, strict=True)):
        feature = key_feature(teacher, teachers.feats[k].astype(jnp.float32), teachers.logits[:, k])
        read.append(_read(teacher, variables.of(name), feature, bool(teacher.adapter_dim)))
    return jnp.stack(read, axis=1)


def query(nets: Networks, variables: Variables, feat: jax.Array) -> jax.Array:
    """What asks, and what feature KD matches [B, Dq]: the student's `feat_2d`, or what its adapter makes of it."""
    return _read(nets.student, variables.of("student"), feat, nets.student_feature == "distill_feat")


def _read(model: KDModel, variables: Mapping[str, Any], feat: jax.Array, adapted: bool) -> jax.Array:
    feat = feat.astype(jnp.float32)
    return model.apply(variables, feat, method="distill") if adapted else feat


def fuse(nets: Networks, variables: Variables, q: jax.Array, kv: jax.Array) -> Latent:
    """IB_MBM on a query [B, Dq] and the teachers' features [B, T, Dk]."""
    return nets.ib_mbm.apply({"params": variables.params["ib_mbm"]}, q, kv)


def classify(
    nets: Networks,
    variables: Variables,
    z: jax.Array,
    teacher_logits: jax.Array | None,
    dropout_keys: jax.Array | None = None,
    kept: jax.Array | None = None,
) -> jax.Array:
    """Synergy logits [B, C] of a code z [B, d]: what the head adds to its base; -inf at classes that nobody knows.

    teacher_logits: [B, T, C], which get no gradient (SPEC 6); None: the base is uniform, as if there were no teachers.
    dropout_keys: [B] keys, from which the head takes its own; None: no dropout. kept: [B, T], the teachers that are in
    the base; None: all.
    """
    if dropout_keys is not None:
        dropout_keys = streams.branch(dropout_keys, "synergy_head")
    known = nets.known
    logs = None if teacher_logits is None else log_probabilities(teacher_logits, known)
    head = {"params": variables.params["synergy_head"]}
    return nets.synergy_head.apply(head, z, logs, known, kept, dropout_keys=dropout_keys)


def base(nets: Networks, variables: Variables, z: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """What synergy is added to, alone: [B, C] of a code z [B, d] and the teachers' logits [B, T, C]."""
    logs, head = log_probabilities(teacher_logits, nets.known), {"params": variables.params["synergy_head"]}
    return nets.synergy_head.apply(head, z, logs, nets.known, method="pool")


def init_network(model: KDModel, seed: int, name: str, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """{"params", "batch_stats"} of one network, the same for a (seed, name) in every configuration."""
    image = jnp.zeros((1, *image_shape))
    variables = _drawn(functools.partial(model.init, train=False), streams.key(seed, f"init/{name}"), image)
    return {"batch_stats": {}, **variables}  # a network without BatchNorm has none


def init_fusion(nets: Networks, seed: int) -> dict[str, Any]:
    """Parameters of "ib_mbm" and "synergy_head"; none without fusion."""
    if nets.ib_mbm is None:
        return {}
    q = jnp.zeros((1, nets.query_dim))
    kv = jnp.zeros((1, len(nets.teachers), feature_dim(nets.teachers[0])))
    code, logs = jnp.zeros((1, nets.ib_mbm.dim)), jnp.zeros((1, *nets.known.shape))
    head = functools.partial(nets.synergy_head.init, known=nets.known)
    return {
        "ib_mbm": _drawn(nets.ib_mbm.init, streams.key(seed, "init/ib_mbm"), q, kv)["params"],
        "synergy_head": _drawn(head, streams.key(seed, "init/synergy_head"), code, logs)["params"],
    }


def _drawn(init: Callable, *arguments: Any) -> dict[str, Any]:
    """Initial values. A CPU's compiler need not optimise what runs once: 2.5 s for a ResNet-8, not 12."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=quick)(*arguments)
