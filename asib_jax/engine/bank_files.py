"""Teachers' outputs kept between runs, each file under a digest of all that they come from."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from asib_jax.data import archives
from asib_jax.data.sources import Split, blocks
from asib_jax.engine.compiled import PRECISION
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, TeacherOutputs, Variables


def paths(
    folder: str,
    nets: Networks,
    teachers: Variables,
    split: Split,
    data_aug: int,
    keys: Sequence[jax.Array],
    rows: np.ndarray | None = None,
) -> list[pathlib.Path]:
    """The file in `folder` of the outputs under each augmentation key: networks, weights, images and view name it.

    rows: of the split that were read; None: all.
    """
    common = _digest(nets, teachers, split, data_aug)
    if rows is not None:
        common.update(b"rows" + rows.astype(np.int64).tobytes())
    return [pathlib.Path(folder).expanduser() / f"{_of_view(common, key)}.npz" for key in keys]


def _digest(nets: Networks, teachers: Variables, split: Split, data_aug: int) -> "hashlib._Hash":
    digest = hashlib.sha256(f"{data_aug} {jax.__version__}".encode())  # the version: its random streams
    pixels = jax.ShapeDtypeStruct((1, *split.image.shape[1:]), np.float32)
    for name, model in zip(nets.teacher_names, nets.teachers):
        variables = teachers.of(name)
        backbone = {
            part: {child: leaves for child, leaves in branch.items() if child != "distill_adapter"}
            for part, branch in variables.items()
        }
        apply = functools.partial(model.clone(adapter_dim=0).apply, train=False)
        with jax.default_matmul_precision(PRECISION):
            program = jax.jit(apply).lower(backbone, pixels).as_text()  # what is computed, and how precisely
        digest.update(program.encode())
        for leaf in jax.tree.leaves(backbone):
            digest.update(np.asarray(leaf).tobytes())
    for array in split:
        digest.update(str(array.shape).encode())
        for block in blocks(array):
            digest.update(block.data)
    return digest


def _of_view(common: "hashlib._Hash", key: jax.Array) -> str:
    digest = common.copy()
    digest.update(np.asarray(jax.random.key_data(key)).tobytes())
    return digest.hexdigest()[:32]


def store(path: pathlib.Path, nets: Networks, view: TeacherOutputs) -> None:
    """Write one view; a reader finds a whole file or none. Features as bytes: .npz knows no bfloat16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        feats = {name: feat.view(np.uint8) for name, feat in zip(nets.teacher_names, view.feats)}
        np.savez(file, logits=view.logits, **feats)  # type: ignore[arg-type]  # no teacher is named as an option
    part.replace(path)


def load(path: pathlib.Path, nets: Networks) -> TeacherOutputs:
    """What `store` has written. Raises UserError naming a file that cannot be read."""
    try:
        stored = archives.read_npz(path, (*nets.teacher_names, "logits"))
        feats = tuple(
            stored[name].view(np.dtype(model.dtype)) for name, model in zip(nets.teacher_names, nets.teachers)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path} (in teacher_cache) cannot be read, delete it: {error}") from error
    return TeacherOutputs(feats, stored["logits"])  # type: ignore[arg-type]  # on the host arrays are numpy's
