"""What is planned where the base is guided and the run is not. Forwards and bytes: `test_nft`, `test_held`."""

from __future__ import annotations

from typing import Any

import pytest

from flowbp_ray.planning import memory
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.work import work
from tests.planning.common import config_of


def activations(config: Any) -> int:
    costs = Costs(config)
    shares = memory.samplers(config, costs, memory.Sizes.of(config, costs)).shares
    [found] = [s.nbytes for s in shares if s.name == "activations, no gradient" and s.phase == "rollout"]
    return found


@pytest.mark.parametrize("name", ["sd35", "flux1"])
def test_a_sampler_has_room_for_the_base_s_two_branches(name: str, folders: Any) -> None:
    """As much as a guided rollout takes; with embedded guidance there is one branch."""
    folder, penalty = folders(name)[1], "learners.base_penalty={weight: 1, guidance: 3}"
    plain, guided, held = (
        activations(config_of(name, folder, *more))
        for more in (["backbone.guidance=1"], ["backbone.guidance=3"], ["backbone.guidance=1", penalty])
    )
    assert held == guided and (plain < guided) == (name == "sd35")


def test_a_sampler_s_operations_grow_by_the_base_s_branches(folders: Any) -> None:
    """By hand, in rows of a forward: 16 images of 25 steps, and the base at each active state once, or twice."""
    folder = folders("sd35")[1]
    found = {}
    for guidance in (None, "null", 3):
        more = [] if guidance is None else [f"learners.base_penalty={{weight: 1, guidance: {guidance}}}"]
        config = config_of("sd35", folder, "backbone.guidance=1", *more)
        sampling = work(config, Costs(config))[0]
        found[guidance] = (sampling.rows, sampling.flops)
    budget = config.surrogate().max_terms(25)
    states = 16 * (budget.terms + budget.junction)
    rows = [found[None][0], found["null"][0], found[3][0]]
    assert rows == [16 * 25, 16 * 25 + states, 16 * 25 + 2 * states]
    flops = [flops / rows for rows, flops in found.values()]
    assert flops == pytest.approx([flops[0]] * 3, rel=1e-6)
