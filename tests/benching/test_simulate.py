"""The simulated loop against schedules worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors import pipeline, pool
from flowbp_ray.benching.points import Ratio
from flowbp_ray.benching.predict import Seconds
from flowbp_ray.benching.simulate import (
    MAX_CALLS_IN_FLIGHT,
    DriverCosts,
    SimulatedLoop,
    Workers,
    scale_up,
    simulate,
    sweep,
)
from flowbp_ray.utils.settings import LOOKING


def test_a_synchronous_step_by_hand() -> None:
    """Two samplers, three items of 2 s, one reward server of 1 s, learning 5 s, publishing 1 s.

    Rollouts end at 2, 2 and 4; scores at 3, 4 and 5; the step at 11.
    """
    loop = SimulatedLoop(Seconds(6, 3, 2.0, 1.0, 5.0, 0.0, 1.0), Ratio(2, 1, 1, 0), DriverCosts())
    loop.step(0)
    assert loop.now == 11.0 and loop.busy == 0.0
    loop.step(1)
    assert loop.now == 22.0


def test_a_stale_step_by_hand() -> None:
    """One sampler, two items of 3 s, scored at once, learning 4 s.

    Rollouts end at 3, 6 (batch 0), 9, 12 (batch 1), ...; learning runs 6 to 10, 12 to 16, 18 to 22.
    """
    loop = SimulatedLoop(Seconds(2, 2, 3.0, 0.0, 4.0), Ratio(1, 1, 1, 1), DriverCosts())
    ends = []
    for step in range(3):
        loop.step(step)
        ends.append(loop.now)
    assert ends == [10.0, 16.0, 22.0]


def test_a_version_is_loaded_once_by_each_sampler() -> None:
    """At staleness 0 every step has a new version: 1 s more in each of the two samplers, at the same time."""
    loop = SimulatedLoop(Seconds(4, 4, 2.0, 0.0, 1.0, load=1.0), Ratio(2, 1, 1, 0), DriverCosts())
    loop.step(0)
    assert loop.now == 1 + 4 + 1
    loop.step(1)
    assert loop.now == 12.0


def test_the_driver_pays_for_rows_calls_answers_looks_ranks_and_steps() -> None:
    """Two calls and two answers an item, and four looks for these: at two rollouts; at one and a scoring; at two
    scorings; at the last one. Then the two ranks answer three calls."""
    costs = DriverCosts(step=0.5, rank=0.25, item=0.4, row=0.05, look=0.1, scan=0.01)
    found = simulate(Seconds(2, 2, 10.0, 1.0, 4.0), Ratio(2, 2, 1, 0), costs, steps=1)
    assert found.looks == 4 + 3
    assert found.looked_at == 2 + 2 + 2 + 1 + 3 * 2
    assert found.driver_s == pytest.approx(0.5 + 2 * 0.25 + 2 * 0.4 + 2 * 0.05 + 7 * 0.1 + 13 * 0.01)
    assert found.messages == 4 * 2 + 6 * 2


def test_looking_takes_its_share_of_the_time_and_answers_gather_meanwhile() -> None:
    """1,000 samplers with an item each second: a look at 2,000 calls takes 20 ms, so at most five are made a second."""
    found = simulate(Seconds(8000, 8000, 1.0, 0.0, 1.0), Ratio(1000, 1, 1000, 1), DriverCosts(scan=1e-5), steps=2)
    assert found.step_s == pytest.approx(8.0, rel=0.05)
    assert found.driver_s <= LOOKING * found.step_s * 1.02
    assert found.step_s <= found.looks <= 5 * found.step_s


def test_workers_are_taken_by_load_and_number() -> None:
    pool = Workers(2)
    assert [pool.acquire() for _ in range(2 * MAX_CALLS_IN_FLIGHT + 1)] == [0, 1, 0, 1, None]
    pool.release(1)
    assert pool.acquire() == 1 and pool.acquire() is None


def test_thousands_of_samplers_scale_until_the_driver_is_the_bottleneck() -> None:
    one, ratio = Seconds(16, 8, 2.0, 0.1, 5.0), Ratio(4, 2, 1, 1)
    free = sweep(one, ratio, [1, 64, 1024], DriverCosts(), 1000.0, 10.0)
    assert [s.ratio.samplers for s in free] == [4, 256, 4096]
    assert free[2].images_per_s == pytest.approx(1024 * free[0].images_per_s, rel=0.05)
    assert free[2].travel_bytes == 1000.0 * 16 * 1024 + 10.0 * 4096
    paid = simulate(*scale_up(one, ratio, 256), DriverCosts(item=0.01), steps=2)
    assert paid.step_s == pytest.approx(256 * 8 * 0.01, rel=0.05) and paid.driver_s == pytest.approx(paid.step_s)


def test_a_look_of_the_pipeline_takes_all_answers_and_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three calls of which two have been answered, then the third: what the simulation pays `scan` for is 3 + 1."""
    encoded: Any = SimpleNamespace(pending=[], check=lambda: None)
    looking = pipeline.Pipeline(pool.Pool("s", [None]), pool.Pool("r", [None]), encoded, [], 1, 1.0)
    ready = iter([["a", "b"], ["c"]])
    settled: list[tuple[Any, Any]] = []
    monkeypatch.setattr(pipeline.ray, "wait", lambda refs, num_returns, timeout: (next(ready), []))
    monkeypatch.setattr(pipeline, "answers", lambda refs: [ref.upper() for ref in refs])
    monkeypatch.setattr(looking, "_settle", lambda job, answer: settled.append((job, answer)))
    looking.running = {ref: number for number, ref in enumerate("abc")}  # type: ignore[misc]
    assert looking._pump() and looking._pump()
    assert (looking.looks, looking.looked_at, looking.running) == (2, 3 + 1, {})
    assert settled == [(0, "A"), (1, "B"), (2, "C")]
