"""GPUs that several roles share: whose phases meet, what they need together, and the parts that Ray is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flowbp_ray.config import loading
from flowbp_ray.planning import cluster
from flowbp_ray.planning.advice import apply_changes, check_fit
from flowbp_ray.planning.cluster import Cluster
from flowbp_ray.planning.colocation import with_parts
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.planning.memory import FRAGMENTATION, WORKSPACE, Role, Share
from flowbp_ray.planning.sharing import Card, pack, parts
from flowbp_ray.utils.units import GIB

SAMPLER = Role("samplers", 1, 0.3, (Share("weights", 6 * GIB), Share("activations", 2 * GIB, "rollout")))
LEARNER = Role("learners", 1, 0.4, (Share("weights", 8 * GIB), Share("activations", 9 * GIB, "backward")))
REWARD = Role("reward servers", 1, 0.3, (Share("decoder", GIB), Share("activations", 5 * GIB, "scoring")))


def with_overhead(*held: int) -> float:
    return sum(bytes_ * (1 + FRAGMENTATION) + WORKSPACE for bytes_ in held)


def test_roles_that_take_turns_need_the_fullest_turn() -> None:
    """Drawing meets scoring (8 + 8 + 6 GiB), learning meets neither (6 + 17 + 1); otherwise all peaks meet."""
    roles = (LEARNER, SAMPLER, REWARD)
    turns, together = Card(roles, True), Card(roles, False)
    assert turns.nbytes == pytest.approx(with_overhead(6 * GIB, 17 * GIB, GIB), abs=4)
    assert together.nbytes == pytest.approx(with_overhead(8 * GIB, 17 * GIB, 6 * GIB), abs=4)
    assert turns.largest is LEARNER and turns.name == "learners + samplers + reward servers"
    light = replace(LEARNER, shares=LEARNER.shares[:1])
    assert Card((light, SAMPLER, REWARD), True).nbytes == pytest.approx(with_overhead(*[8 * GIB] * 2, 6 * GIB), abs=4)


def test_parts_follow_needs_and_never_exceed_a_gpu() -> None:
    assert parts([25, 27, 8]) == [0.416, 0.45, 0.133]
    for needs in ([1], [1, 1, 1], [10**9, 1, 1], [0, 0], [7, 11, 13, 17] * 5, [10**6] + [1] * 40):
        found = parts(needs)
        assert sum(found) <= 1 + 1e-9 and min(found) >= 0.001
        assert len(pack([(1, part) for part in found])) == 1


def shared(*more: str) -> Any:
    small = ["data.prompts_per_step=8", "data.rollout_batch=4", "learners.micro_batch=4", "evaluation.batch=4"]
    return loading.load("shapes_flowbp_sparse", [*small, "learners.count=1", "cluster.colocate=true", *more])


@pytest.fixture(scope="module")
def costs() -> Costs:
    """Traces that all tests share."""
    return Costs(shared())


def test_a_colocated_run_gives_each_role_what_it_needs(costs: Costs) -> None:
    """The parts are in proportion to the bytes, also with pools of several, and of those that may grow."""
    for extra in ([], ["samplers.count=3"], ["samplers.count=1", "samplers.max=4"]):
        config = shared(*extra)
        plan = forecast(config, costs)
        most = [config.samplers.max or config.samplers.count, 1, config.rewards.count]
        assert 0.98 < sum(n * role.gpus for n, role in zip(most, plan.roles, strict=True)) <= 1
        total = sum(n * role.nbytes for n, role in zip(most, plan.roles, strict=True))
        for role in plan.roles:
            assert role.gpus == pytest.approx(role.nbytes / total, abs=0.002)
        assert cluster.count_gpus(plan) == 1 and len(cluster.cards(plan)[0].roles) == sum(r.count for r in plan.roles)
        placed = with_parts(config, costs)
        assert [pool.gpus for pool in (placed.samplers, placed.learners, placed.rewards)] == [
            role.gpus for role in plan.roles
        ]
    apart = loading.load("shapes_flowbp_sparse")
    assert with_parts(apart) is apart


def test_a_shared_gpu_is_judged_by_the_sum_and_mended_together(costs: Costs) -> None:
    config = shared()
    needed = cluster.cards(forecast(config, costs))[0].nbytes
    assert check_fit(config, Cluster((needed,)), costs).fits
    verdict = check_fit(config, Cluster((needed - 1,)), costs)
    assert not verdict.fits and "learners + samplers + reward servers need" in verdict.line and verdict.changes
    changed = apply_changes(config, verdict.changes)
    assert changed is not None and check_fit(changed, Cluster((needed - 1,)), costs).fits
    assert cluster.cards(forecast(shared("staleness=1"), costs))[0].nbytes > needed


def test_parts_written_by_hand_stay_as_they_are(costs: Costs) -> None:
    """Only `colocate` sets them; and without it nobody gives memory back, so all peaks add up."""
    config = shared("cluster.colocate=false", "learners.gpus=0.5", "samplers.gpus=0.25")
    plan = forecast(config, costs)
    assert [role.gpus for role in plan.roles] == [0.25, 0.5, 0.0]
    assert cluster.cards(plan)[0].nbytes == sum(role.count * role.nbytes for role in plan.roles[:2])
