"""A rollout takes the steps that its plans need, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.messages import Item, Version, unpack
from flowbp_ray.rollout.execute import VelocityRecorder, run_item
from flowbp_ray.rollout.items import plans_of_step
from flowbp_ray.surrogate import METHODS, Method, gather_states, gather_targets, gather_velocities, rollout
from tests.surrogate.networks import WIDTH, Network

STEPS, ROWS = 10, 3


@pytest.mark.parametrize("method", [METHODS["refl"](5), METHODS["drtune"](3, 0.4)], ids=["refl", "drtune"])
def test_a_posterior_mean_ends_the_rollout(method: Method) -> None:
    """The steps are counted; what is kept is read from a whole rollout of all steps."""
    sigmas, network = static_shift(STEPS, 3.0), Network(ROWS, STEPS, 0)
    noise = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    taken = set()
    for step in range(8):
        plans = plans_of_step(method, sigmas, 7, step, ROWS)
        calls, recorder = [], VelocityRecorder()

        def velocity(
            x: Tensor, node: Tensor, row: Tensor, calls: list[Tensor] = calls, seen: VelocityRecorder = recorder
        ) -> Tensor:
            calls.append(node)
            seen(v := network(x, node, row))
            return v

        rows = tuple(range(ROWS))
        item = Item("train", step, 0, rows, rows, plans, 7, STEPS, 1.0, Version(0, step))
        report, kept, target = run_item(item, velocity, sigmas, noise, recorder)
        last = max(branch.target.node for plan in plans for branch in plan.branches)  # type: ignore[union-attr]
        assert [int(node[0]) for node in calls] == list(range(last + 1))
        whole = rollout(network, noise, sigmas)
        assert torch.equal(unpack(target), gather_targets(plans, whole))
        assert torch.equal(unpack(kept.states), gather_states(plans, whole))
        assert kept.velocities is not None
        assert torch.equal(unpack(kept.velocities), gather_velocities(plans, whole))
        assert report.faults == () and all(report.kept)
        taken.add(last + 1)
    assert len(taken) > 1, "all draws were the same"


@pytest.mark.parametrize("name", ["flowbp_sparse", "leapalign", "draft_lv"])
def test_other_targets_need_all_steps(name: str) -> None:
    method = METHODS[name]()
    assert {plan.stop for plan in plans_of_step(method, static_shift(STEPS, 3.0), 7, 0, 4)} == {STEPS}
    assert method.mean_stop(STEPS, 4) == STEPS
