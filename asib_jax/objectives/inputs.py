"""What the A- and B-Step read of a batch.

It holds image [B, H, W, ch] uint8, label and index [B], and, where networks were run beforehand, their outputs under
"teachers" and "student"; with both the A-Step needs no image.
"""

import jax
import jax.numpy as jnp

from asib_jax.data.augment import augment
from asib_jax.models.ensemble import Mode, Networks, TeacherOutputs, Variables, run_teachers


def augmented(controls: dict, batch: dict, data_aug: int) -> jax.Array | None:
    """The augmented images; None where the batch has none."""
    return augment(controls["augment_key"], batch["index"], batch["image"], data_aug) if "image" in batch else None


def divided(controls: dict, teachers: TeacherOutputs) -> TeacherOutputs:
    """The outputs, stored or of networks, as what learns from them sees them: logits float32, each teacher's divided
    by its own of controls["temperatures"] [T]."""
    return teachers._replace(logits=teachers.logits.astype(jnp.float32) / controls["temperatures"][:, None])


def teacher_outputs(
    nets: Networks,
    variables: Variables,
    controls: dict,
    pixels: jax.Array | None,
    batch: dict,
    modes: tuple[Mode, ...] = (),
    dropout_keys: jax.Array | None = None,
) -> tuple[TeacherOutputs, dict]:
    """The teachers' outputs on the batch, `divided`, and their batch statistics: stored outputs if it brings them, else
    run now."""
    if "teachers" in batch:
        return divided(controls, batch["teachers"]), {}
    outputs, stats = run_teachers(nets, variables, pixels, modes, dropout_keys)
    return divided(controls, outputs), stats
