"""A plan as the text that `--dry_run` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from asib_jax import preparation
from asib_jax.engine import hosts
from asib_jax.engine.feed import GIB
from asib_jax.recipe import Recipe
from asib_jax.record import resume
from asib_jax.record.reporting import table
from asib_jax.tools import plan as plans
from asib_jax.tools.plan import Plan, Step

_NOTES = """\
GFLOPs: of one image's forward pass in evaluation, 2 operations for a multiply-add, before XLA optimises.
GiB on each device, an estimate that XLA may undercut or exceed, without images and stored outputs (device_data_gb):
  networks    variables of the networks that the step uses; frozen teachers' in the type that they compute in
  state       what the step trains once more, and the optimizer's moments
  gradients   of what the step trains
  backward    every value that the backward pass reads, as if nothing were fused or computed twice
  operation   the most that one operation of the forward passes, the teachers' too, reads and writes beside these"""


def tell(config: Mapping[str, Any], name: str, defaults: Recipe) -> None:
    """Print what the run that `train.start` begins with the same arguments would do. The errors of `plan.make`."""
    recipe = preparation.checked(config)
    found = resume.find(recipe, name)
    if hosts.is_first():
        goes_on = f"goes on with {found}" if found else ""
        print(
            *filter(None, (text(recipe, plans.make(recipe)), preparation.warning(recipe, defaults), goes_on)), sep="\n"
        )


def text(recipe: Recipe, plan: Plan) -> str:
    """The recipe's plan as tables and their explanation."""
    sizes, images = plan.sizes, plan.images
    shape = "x".join(map(str, sizes.image_shape))
    return "\n".join(
        [
            f"data: {sizes.origin}; images {shape}, {sizes.num_classes} classes",
            f"  {images['train']:,} training (student), {images['teacher_train']:,} training (teachers), "
            f"{images['validation']:,} validation, {images['test']:,} test images",
            f"batches of {recipe.dataset.batch_size}, {plan.batch} on each device, {recipe.compute_dtype}",
            "",
            *_network_table(plan),
            *plan.known,
            "",
            *_step_table(plan),
            "",
            _totals(plan.steps),
            *plan.stored,
            *([f"warning: {plan.warning}"] if plan.warning else []),
            "",
            _NOTES,
        ]
    )


def _network_table(plan: Plan) -> list[str]:
    rows = [(row.role, row.name, f"{row.parameters:,}", f"{row.flops / 1e9:.3f}", row.origin) for row in plan.networks]
    return table([("network", "name", "parameters", "GFLOPs", "from"), *rows], "<<>><")


def _step_table(plan: Plan) -> list[str]:
    header = (
        "training",
        "epochs",
        "steps",
        "networks",
        "state",
        "gradients",
        "backward",
        "operation",
        "GiB in all",
        "trained/all parameters",
    )
    rows = []
    for step in plan.steps:
        parts = (step.networks, step.cost.state, step.cost.gradients, *step.cost.activations)
        trained = ", ".join(f"{name} {count:,}/{whole:,}" for name, (count, whole) in step.trained.items())
        rows.append(
            (
                step.title,
                f"{step.epochs:,}",
                f"{step.steps:,}",
                *(f"{part / GIB:.3f}" for part in (*parts, sum(parts))),
                trained,
            )
        )
    return table([header, *rows], "<>>>>>>>><")


def _totals(steps: Sequence[Step]) -> str:
    kinds: dict[str, list[Step]] = {}
    for step in steps:
        kinds.setdefault(step.title.partition(",")[0], []).append(step)
    parts = [
        f"{kind} {sum(step.epochs for step in found):,} epochs, {sum(step.steps for step in found):,} steps"
        for kind, found in kinds.items()
    ]
    return f"in all {sum(step.steps for step in steps):,} steps: {'; '.join(parts)}"
