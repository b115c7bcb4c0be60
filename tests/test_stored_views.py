"""Which views are stored, for whom, and what a person is told; sizes and counts by hand."""
import dataclasses

import pytest

from asib_jax import build
from asib_jax.engine import stored_views
from asib_jax.recipe import recipe as recipes
from configs import l2_cccp

IMAGES, CLASSES = 1000, 10
CONFIG = {"teacher_adapt_epochs": 3, "student_epochs_per_stage": (4, 4), "a_step_views": 2, "b_step_views": 6}
# ResNet-14 and ResNet-8 have 64 features. A-Step views (0,0), (0,1); B-Step (0,0) .. (0,3), (1,0), (1,1).
TEACHERS = 6 * IMAGES * 2 * 4 * (64 + CLASSES)
STUDENT = 2 * IMAGES * 4 * (64 + CLASSES)  # both views in either stage


def decide(**changes):
    config = l2_cccp.get_config("digits")
    config.update_from_flattened_dict(CONFIG | changes)
    recipe = recipes.read(config)
    return stored_views.decide(recipe, build.build_networks(recipe, CLASSES), IMAGES)


def test_both_steps_read_what_is_stored_once():
    """Six views cover both steps: 6,000 readings instead of (2 x 3 + 8) x 1,000."""
    decision = decide()
    gib = (TEACHERS + STUDENT) / 2 ** 30
    assert decision.steps == {"a", "b"}
    assert decision.lines == (f"stored: the teachers' outputs on 6 view(s) of 1,000 training images, and the student's "
                              f"for each A-Step, {gib:.3g} GiB; teachers read 6,000 images instead of 14,000",)


@pytest.mark.parametrize("changes, steps, told", [
    ({"a_step_views": 0}, {"b"}, "the A-Step runs the teachers at every step: a_step_views=0 asks for new views"),
    ({"b_step_views": 0}, {"a"}, "the B-Step runs the teachers at every step: b_step_views=0 asks for new views"),
    ({"mixup_alpha": 0.2}, {"a"}, "the B-Step runs the teachers at every step: they have to see the images that mixup"),
    ({"cutmix_alpha_distill": 1.0}, {"a"}, "they have to see the images that mixup_alpha or cutmix_alpha_distill"),
    ({"use_teacher_finetuning": True}, set(), "the A-Step runs the teachers at every step: use_teacher_finetuning"),
    ({"bank_memory_gb": (TEACHERS + STUDENT - 1) / 2 ** 30}, {"b"},
     "the A-Step runs the teachers at every step: with it 0.00386 GiB exceed bank_memory_gb=0.0038"),
    ({"bank_memory_gb": (TEACHERS - 1) / 2 ** 30}, {"a"}, "the B-Step runs the teachers at every step: with it"),
    ({"bank_memory_gb": 1e-4}, set(), "the B-Step runs the teachers at every step: with it 0.0"),
])
def test_what_is_not_stored_is_told_with_its_reason(changes, steps, told):
    decision = decide(**changes)
    assert decision.steps == steps
    assert any(told in line for line in decision.lines), decision.lines


def test_features_in_sixteen_bits_take_half():
    assert decide(use_amp=True, bank_memory_gb=(TEACHERS + STUDENT) / 2 ** 30 / 1.5).steps == {"a", "b"}


@pytest.mark.parametrize("changes", [{"kd_alpha": 0.0, "ce_alpha": 1.0}, {"kd_target": "avg"}])
def test_who_uses_no_teacher_or_no_a_step_is_told_nothing_of_them(changes):
    decision = decide(**changes)
    assert decision.steps == ({"b"} if "kd_target" in changes else set())
    assert not any("A-Step" in line for line in decision.lines)


def test_views_of_epochs():
    """A view is the epoch of the run, modulo V; by default an epoch's own."""
    config = l2_cccp.get_config("digits")
    config.update_from_flattened_dict(CONFIG)
    recipe = recipes.read(config)

    def views(step, epochs, **changes):
        changed = dataclasses.replace(recipe, **changes)
        return [stored_views.view(changed, step, stage, epoch) for stage in (0, 1) for epoch in range(epochs)]

    assert views("a", 3) == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 0), (0, 1)]
    assert views("b", 4) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (0, 0), (0, 1)]
    own = [(stage, epoch) for stage in (0, 1) for epoch in range(4)]
    assert views("b", 4, b_step_views=0) == views("b", 4, b_step_views=8) == views("b", 4, b_step_views=99) == own
