"""Schedules against closed forms, worked out by hand."""

import numpy as np
import pytest

from asib_jax.objectives import schedules

DEFAULTS = dict(
    base=1e-3,
    steps_per_epoch=10,
    epochs=20,
    warmup_epochs=5,
    kind="cosine",
    min_lr=1e-5,
    step_size=8,
    gamma=0.1,
    milestones=(7, 15),
)


def rate(step, **overrides):
    return schedules.learning_rate(step, **(DEFAULTS | overrides))


def test_warm_up_is_linear_and_ends_at_base():
    np.testing.assert_allclose([rate(step) for step in range(50)], 1e-3 * np.arange(1, 51) / 50, rtol=1e-12)
    assert rate(0, warmup_epochs=0) == 1e-3


def test_cosine_ends_at_min_lr():
    """Half way 0.5 (base + min_lr); the last step is one step short of the end of the half period (SPEC 10.11)."""
    assert rate(50) == 1e-3
    np.testing.assert_allclose(rate(125), 0.5 * (1e-3 + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(rate(199), 1e-5 + 0.99e-3 * np.sin(np.pi / 300) ** 2, rtol=1e-9)
    assert rate(200) == rate(10_000) == 1e-5
    assert rate(199, warmup_epochs=20) == rate(200, warmup_epochs=20) == 1e-3  # all of it warm-up
    assert rate(125, min_lr=1e-3) == 1e-3


def test_cosine_below_its_floor_is_an_error():
    with pytest.raises(ValueError, match="schedule.min_lr=0.0001 .* 1e-06"):
        rate(60, base=1e-6, min_lr=1e-4)


def test_step_and_multistep_count_epochs_from_the_start():
    steps = [60, 79, 80, 159, 160]
    np.testing.assert_allclose([rate(s, kind="step") for s in steps], [1e-3, 1e-3, 1e-4, 1e-4, 1e-5], rtol=1e-12)
    steps = [50, 69, 70, 149, 150, 199]
    np.testing.assert_allclose(
        [rate(s, kind="multistep") for s in steps], [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-12
    )


def test_learning_rate_errors_name_the_key():
    with pytest.raises(ValueError, match="schedule.lr_warmup_epochs=21 .* 20 epochs"):
        rate(0, warmup_epochs=21)
    with pytest.raises(ValueError, match="schedule.type='linear'.*cosine, step, multistep"):
        rate(60, kind="linear")


@pytest.mark.parametrize("n, beta", [(0, 0.0), (4, 0.01), (8, 0.02), (30, 0.02)])
def test_beta_warms_up_from_zero(n, beta):
    assert schedules.ib_beta(n, beta=0.02, warmup_epochs=8, schedule=None) == pytest.approx(beta, abs=0)


@pytest.mark.parametrize("n, beta", [(0, 0.1), (5, 0.3), (10, 0.5), (11, 0.5)])
def test_beta_schedule_beats_beta(n, beta):
    assert schedules.ib_beta(n, beta=9.0, warmup_epochs=3, schedule=(0.1, 0.5, 10)) == pytest.approx(beta)


def test_beta_schedule_of_no_epochs_begins_at_its_start():
    assert [schedules.ib_beta(n, beta=9.0, warmup_epochs=3, schedule=(0.1, 0.5, 0)) for n in (0, 1)] == [0.1, 0.5]


def test_beta_without_warm_up_is_constant():
    assert schedules.ib_beta(0, beta=0.02, warmup_epochs=0, schedule=()) == 0.02


def test_tau_schedule_beats_tau():
    """SPEC 10.11. Linear by default; with power 2 half way is a quarter of the way up."""
    linear = [schedules.temperature(e, 5, tau=9.0, schedule=(2, 6), power=1) for e in range(5)]
    assert linear == [2, 3, 4, 5, 6]
    assert schedules.temperature(2, 5, tau=9.0, schedule=(2, 6), power=2) == 3
    assert schedules.temperature(4, 5, tau=9.0, schedule=(6, 2), power=0.5) == 2
    assert schedules.temperature(0, 1, tau=9.0, schedule=(2, 6), power=1) == 2
    assert schedules.temperature(3, 5, tau=9.0, schedule=None, power=1) == 9.0


def test_kd_ramp_is_for_the_first_stage_only():
    assert [schedules.kd_ramp(e, 0, 4) for e in range(5)] == [
        (0.25, False),
        (0.5, False),
        (0.75, False),
        (1.0, False),
        (1.0, True),
    ]
    assert schedules.kd_ramp(0, 1, 4) == (1.0, True)
    assert schedules.kd_ramp(0, 0, 0) == (1.0, True)


@pytest.mark.parametrize(
    "epoch, epochs, end, share",
    [(0, 5, 0.1, 0.5), (1, 5, 0.1, 0.4), (4, 5, 0.1, 0.1), (3, 5, None, 0.5), (0, 1, 0.1, 0.5)],
)
def test_students_share_is_linear_over_the_run(epoch, epochs, end, share):
    assert schedules.student_share(epoch, epochs, start=0.5, end=end) == pytest.approx(share, rel=1e-12)
