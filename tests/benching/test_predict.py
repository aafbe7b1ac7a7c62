"""The step in closed form: against sums and maxima by hand, and against the simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbp_ray.benching.points import Point, Ratio
from flowbp_ray.benching.predict import Seconds, driver_share, fit, from_work, relative_errors
from flowbp_ray.benching.simulate import simulate

ONE = Seconds(batch=32, items=8, sampler=2.0, reward=0.5, learner=12.0, load=0.25, fixed=0.5)


def measured(ratio: Ratio, step_s: float, seconds: Seconds = ONE) -> Point:
    """A point whose roles took `seconds`."""
    return Point(
        ratio=ratio,
        steps=3,
        batch=seconds.batch,
        items=seconds.items,
        devices=4,
        step_s=step_s,
        sampler_s=seconds.sampler,
        reward_s=seconds.reward,
        learner_s=seconds.learner / ratio.learners,
        load_s=seconds.load,
        wait_s=0.0,
        learn_s=seconds.learner / ratio.learners,
        publish_s=seconds.fixed,
        driver_s=0.1,
        driver_thread_s=0.1,
        looks=10.0,
        looked_at=20.0,
        idle={},
        bytes_per_image=100.0,
        weight_bytes=10.0,
        retries=0,
    )


def test_without_staleness_a_step_is_the_sum() -> None:
    """One sampler: 8 items, the last one's scoring, learning, publishing. Three: three rounds, the last of two."""
    assert ONE.step(Ratio(1, 1, 1, 0)) == 0.25 + 16 + 0.5 + 12 + 0.5
    assert ONE.step(Ratio(3, 2, 1, 0)) == 0.25 + 6 + 1.0 + 6 + 0.5
    assert ONE.ideal(Ratio(2, 1, 1, 0)) == 8 + 12


def test_with_staleness_a_step_is_the_longest_role() -> None:
    assert ONE.step(Ratio(1, 1, 1, 1)) == 16.25 and ONE.bottleneck(Ratio(1, 1, 1, 1)) == "samplers"
    assert ONE.step(Ratio(4, 1, 1, 1)) == 12.5 and ONE.bottleneck(Ratio(4, 1, 1, 1)) == "learners"
    assert ONE.step(Ratio(8, 12, 1, 1)) == 4.0 and ONE.bottleneck(Ratio(8, 12, 1, 1)) == "rewards"
    assert ONE.ideal(Ratio(4, 1, 1, 1)) == 12.0


def test_more_samplers_than_items_do_not_help() -> None:
    """A batch must be sampled, scored and learned; staleness 1 lets two batches overlap."""
    few = Seconds(batch=8, items=2, sampler=10.0, reward=0.0, learner=4.0)
    assert few.step(Ratio(2, 1, 1, 1)) == few.step(Ratio(64, 1, 1, 0)) / 2 + 3.0 == 10.0
    assert few.step(Ratio(64, 1, 1, 1)) == 7.0 and few.bottleneck(Ratio(64, 1, 1, 1)) == "chain"


def test_recommended_counts_are_in_proportion_to_the_work() -> None:
    balanced = Seconds(batch=8, items=8, sampler=3.0, reward=0.1, learner=8.0)
    assert balanced.recommended() == (6, 2, 1)


def test_a_fit_on_one_ratio_predicts_the_others() -> None:
    """The residual of a synchronous point is the driver's; learning counts once for all ranks."""
    slower = Seconds(batch=32, items=8, sampler=2.0, reward=0.5, learner=12.0, load=0.25, fixed=0.9)
    points = [measured(r, slower.step(r)) for r in (Ratio(2, 2, 1, 0), Ratio(4, 1, 1, 0), Ratio(2, 1, 1, 1))]
    found = fit(points[0])
    assert found.learner == 12.0 and found.fixed == pytest.approx(0.9)
    assert all(abs(error) < 1e-12 for error in relative_errors(points, found).values())


def test_plans_work_at_a_measured_speed() -> None:
    """Only one number is taken from the point: the fitted step is its own, the others follow the work."""
    at = measured(Ratio(1, 1, 1, 0), 28.5)
    found = from_work((160.0, 120.0, 40.0), at)
    assert found.step(at.ratio) == pytest.approx(28.5)
    assert found.sampler * 8 / found.learner == pytest.approx(160 / 120)


def test_the_drivers_share_is_extrapolated_from_items_and_processes() -> None:
    """CPU of a step = 0.1 + 0.01 per item + 0.001 per process and second."""
    points = []
    for samplers, items, step_s in ((1, 8, 9.0), (2, 8, 5.0), (4, 16, 6.0), (8, 16, 3.0)):
        found = measured(Ratio(samplers, 1, 1, 1), step_s)
        cpu = 0.1 + 0.01 * items + 0.001 * (samplers + 2) * step_s
        points.append(Point(**{**found.__dict__, "items": items, "driver_s": cpu}))
    wanted = (0.1 + 0.32 + 0.001 * 18 * 2.0) / 2.0
    assert driver_share(points, Ratio(16, 1, 1, 1), 32, 2.0) == pytest.approx(wanted)


@given(
    samplers=st.integers(1, 12),
    learners=st.integers(1, 4),
    staleness=st.integers(0, 1),
    items=st.integers(1, 24),
    sampler=st.floats(0.5, 4.0),
    learner=st.floats(0.5, 30.0),
)
def test_the_simulation_of_the_loop_is_the_closed_form(
    samplers: int, learners: int, staleness: int, items: int, sampler: float, learner: float
) -> None:
    """With nothing but sampling and learning; at staleness 1 up to the rounds that do not come out even."""
    seconds = Seconds(items, items, sampler, 0.0, learner, 0.0, 0.25)
    ratio = Ratio(samplers, learners, 1, staleness)
    found = simulate(seconds, ratio, steps=40).step_s
    if staleness == 0:
        assert found == pytest.approx(seconds.step(ratio))
    else:
        assert seconds.step(ratio) - 1e-9 <= found + sampler / 40 <= seconds.step(ratio) + sampler + sampler / 40
