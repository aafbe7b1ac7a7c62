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
from flowbp_ray.planning.pairs import compare
from flowbp_ray.planning.sharing import Card, divide, pack, parts
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


ONE = ["rewards.count=1"]


def paired(*more: str) -> Any:
    return shared(
        "cluster.colocate=pairs", "learners.count=2", "samplers.count=2", "learners.engine=deepspeed", *ONE, *more
    )


def test_every_gpu_of_pairs_has_one_learner_and_one_sampler(costs: Costs) -> None:
    """However little one role needs beside the other, and with reward servers beside them or on their own GPU."""
    names = ["learners", "samplers"]
    for rewards, expected in (
        ("0.2", [[*names, "reward servers"], names]),
        ("0.123", [[*names, "reward servers"], names]),
        ("0.5", [names, names, ["reward servers"]]),
        ("1", [names, names, ["reward servers"]]),
        ("0", [names, names]),
    ):
        config = paired(f"rewards.gpus={rewards}")
        plan = forecast(config, costs)
        assert plan.turns and [[role.name for role in card.roles] for card in cluster.cards(plan)] == expected
        placed = with_parts(config, costs)
        assert [placed.samplers.gpus, placed.learners.gpus] == [role.gpus for role in plan.roles[:2]]
        least, most = Role("", 2, 0.0, ()), Role("", 2, 0.0, (Share("weights", 80 * GIB),))
        for samplers, learners in ((least, most), (most, least), (least, least)):
            divided = divide(config, (samplers, learners, plan.roles[2]))
            assert [len(gpu) for gpu in pack([(2, divided[1].gpus), (2, divided[0].gpus)])] == [2, 2]
            assert pack([(2, divided[1].gpus), (2, divided[0].gpus)]) == [[0, 1], [0, 1]]
    sampler, learner = forecast(paired(), costs).roles[:2]
    card = cluster.cards(forecast(paired(), costs))[0]
    assert card.nbytes < sampler.nbytes + learner.nbytes


def test_pairs_beside_the_fastest_split(costs: Costs) -> None:
    """Eight items on four GPUs: of the splits 3 + 1 and 2 + 2 (three ranks cannot divide them) the faster one."""

    def relative(sampling: float, learning: float, *more: str) -> Any:
        batch = ["data.prompts_per_step=8", "data.images_per_prompt=4", "data.rollout_batch=4"]
        own = ["samplers.count=4", "learners.count=4", "rewards.gpus=0", *more]
        times = [replace(role, time=time) for role, time in zip(work, (sampling, learning, 7.0), strict=True)]
        return compare(paired(*batch, *own), times)

    work = forecast(paired(), costs).work
    even = relative(8, 8)
    assert even.split == (2, 2) and even.pairs == even.gpus == 4
    assert even.time == pytest.approx((8 / 4 + 8 / 4) / (8 / 2 + 8 / 2))
    drawing = relative(80, 4)
    assert drawing.split == (3, 1) and drawing.time == pytest.approx((20 + 1) / (80 * 3 / 8 + 4))
    own, beside = (relative(8, 8, f"rewards.gpus={part}").time for part in (1, 0.2))
    assert own == pytest.approx((7 + 2) / (7 + 4)) and beside == pytest.approx((2 + 7 + 2) / (7 + 4))
    apart = ["cluster.colocate=false", "samplers.gpus=1", "learners.gpus=1"]
    six = relative(8, 8, *apart, "samplers.count=4", "learners.count=2")
    assert six.gpus == 6 and six.pairs == 4 and six.split == (4, 2) and six.time == pytest.approx(4 / 6)
    assert relative(8, 8, *apart, "staleness=1") is None
    assert relative(8, 8, "cluster.colocate=false", "samplers.gpus=0", "learners.gpus=0") is None
    assert "4 samplers and 2 learners, the fastest split of 6 GPUs" in six.line


def test_too_many_pairs_are_mended_by_fewer_of_both(costs: Costs) -> None:
    verdict = check_fit(paired("rewards.gpus=1"), Cluster((80 * GIB,) * 2), costs)
    assert verdict.changes == {"samplers.count": 1, "learners.count": 1, "rewards.count": 1}
