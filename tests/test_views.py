"""Which views are stored, for whom, and what a person is told; sizes and counts by hand."""

import pytest
from networks import make_feed

from asib_jax import build, recipe as recipes, train
from asib_jax.engine import views
from configs import l2_cccp

IMAGES, CLASSES = 1000, 10
CONFIG = {"teacher_adapt_epochs": 3, "student_epochs_per_stage": (4, 4), "a_step_views": 2, "b_step_views": 6}
# ResNet-14 and ResNet-8 have 64 features. A-Step views (0,0), (0,1); B-Step (0,0) .. (0,3), (1,0), (1,1).
TEACHERS = 6 * IMAGES * 2 * 4 * (64 + CLASSES)
STUDENT = 2 * IMAGES * 4 * (64 + CLASSES)  # both views in either stage


IMAGE = 64  # bytes


def choose(devices=1, images=IMAGE, **changes):
    config = l2_cccp.get_config("digits")
    config.update_from_flattened_dict(CONFIG | changes)
    recipe = recipes.read(config)
    nets = build.build_networks(recipe, CLASSES)
    shapes = build.variable_shapes(recipe, nets, (8, 8, 1))
    phases = train.phases_of(recipe, nets, shapes.params, {"train": IMAGES}, {})
    feed = make_feed(devices, room_gb=recipe.device_data_gb)
    return views.choose([phase for phase in phases if phase.nets.teachers], nets, IMAGES, IMAGES * images, feed), phases


def test_both_steps_read_what_is_stored_once():
    """Six views cover both steps: 6,000 readings instead of (2 x 3 + 8) x 1,000."""
    stored, _ = choose()
    gib = (TEACHERS + STUDENT) / 2**30
    assert stored.views == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}
    assert stored.lines == (
        f"stored: the teachers' outputs on 6 view(s) of 1,000 training images, and the student's "
        f"for each A-Step, {gib:.3g} GiB; teachers read 6,000 images instead of 14,000",
    )


@pytest.mark.parametrize(
    "changes, count, told",
    [
        ({"a_step_views": 0}, 6, "the A-Step runs the teachers at every step: a_step_views=0 asks for new views"),
        ({"b_step_views": 0}, 2, "the B-Step runs the teachers at every step: b_step_views=0 asks for new views"),
        ({"mixup_alpha": 0.2}, 2, "the B-Step runs the teachers at every step: they have to see the images that mixup"),
        ({"cutmix_alpha_distill": 1.0}, 2, "they have to see the images that mixup_alpha or cutmix_alpha_distill"),
        ({"use_teacher_finetuning": True}, 0, "the A-Step runs the teachers at every step: use_teacher_finetuning"),
    ],
)
def test_what_is_not_read_from_a_bank_is_told_with_its_reason(changes, count, told):
    stored, phases = choose(**changes)
    assert len(stored.views) == count
    assert any(told in line for line in stored.lines), stored.lines
    runs = {phase.optimizer for phase in phases if phase.runs_networks}
    assert all(phase.reads or phase.optimizer in runs for phase in phases if phase.nets.teachers)


@pytest.mark.parametrize("short, count", [(0, 6), (1, 5), (TEACHERS // 6, 5), (TEACHERS // 6 + 1, 4), (TEACHERS, 1)])
def test_as_many_views_as_fit_beside_the_images_those_of_most_epochs_first(short, count):
    """Room for everything but so many bytes. The A-Step's two views serve eight epochs, the others six; where the
    student's outputs do not fit as well, one of the B-Step's own views does."""
    room = TEACHERS + STUDENT + IMAGES * IMAGE - short
    stored, _ = choose(device_data_gb=room / 2**30)
    assert len(stored.views) == count
    assert stored.views >= {(0, 0), (0, 1)} if count > 1 else stored.views == {(0, 2)}
    if short:
        assert f"{6 - count} of 6 views are not stored" in stored.lines[1]
        assert f"all would take {(TEACHERS + STUDENT) / 2**30:.3g} GiB" in stored.lines[1]
        assert f"teachers read {count * IMAGES:,} images" in stored.lines[0]
    more, _ = choose(devices=4, device_data_gb=room / 4 / 2**30)
    assert more.views == stored.views  # spread over the devices


def test_a_later_view_of_more_epochs_goes_before_an_earlier_one():
    """Of stages with one and with three B-epochs: (0,1) and (0,2) are the A-Step's alone and serve one epoch, the
    others two."""
    lengths = {"student_epochs_per_stage": (1, 3), "a_step_views": 6, "b_step_views": 6}
    room = 4 * TEACHERS // 6 + 3 * STUDENT // 2 + IMAGES * IMAGE
    stored, _ = choose(device_data_gb=room / 2**30, **lengths)
    assert stored.views == {(0, 0), (1, 0), (1, 1), (1, 2)}


def test_images_that_do_not_fit_leave_their_room_to_the_views():
    room = TEACHERS + STUDENT + 1
    assert len(choose(device_data_gb=room / 2**30, images=10**6)[0].views) == 6
    assert choose(device_data_gb=0)[0].views == frozenset()


def test_outputs_in_sixteen_bits_take_half():
    room = (TEACHERS + STUDENT) / 2 + IMAGES * IMAGE
    assert len(choose(use_amp=True, device_data_gb=room / 2**30)[0].views) == 6


@pytest.mark.parametrize("changes", [{"kd_alpha": 0.0, "ce_alpha": 1.0}, {"kd_target": "avg"}])
def test_who_uses_no_teacher_or_no_a_step_is_told_nothing_of_them(changes):
    stored, _ = choose(**changes)
    assert len(stored.views) == (6 if "kd_target" in changes else 0)
    assert not any("A-Step" in line for line in stored.lines)


def test_views_of_epochs():
    """A view is the epoch of the run, modulo V; by default an epoch's own."""

    def of(optimizer, **changes):
        return [view for phase in choose(**changes)[1] if phase.optimizer == optimizer for view in phase.views]

    assert of("a") == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 0), (0, 1)]
    assert of("b") == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (0, 0), (0, 1)]
    own = [(stage, epoch) for stage in (0, 1) for epoch in range(4)]
    assert of("b", b_step_views=0) == of("b", b_step_views=8) == of("b", b_step_views=99) == own
