"""Models that wait on the host: where their tensors are, and that scores and cotangents are the same bits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowbp_ray.local import LocalLoop
from flowbp_ray.planning import reward_memory
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.memory import Sizes
from flowbp_ray.rewards.offload import Offloaded, modules_of
from tests.small import small_config


class Holder:
    """A reward's way to hold models: as an attribute, in a list, in a closure, and bound to a partial call."""

    def __init__(self) -> None:
        parts = [nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(3, 3), nn.Linear(4, 4)]
        self.parts: list[nn.Module] = parts
        self.own, self.many = parts[0], {"norm": [parts[1]]}
        self.closed = lambda x: parts[2](x)
        self.bound: Any = functools.partial(parts[3].forward)
        self.itself = self


def test_modules_are_found_wherever_they_are() -> None:
    holder = Holder()
    del holder.__dict__["parts"]
    assert {type(m).__name__ for m in modules_of([holder])} == {"Linear", "BatchNorm1d"}
    assert len(modules_of([holder, holder.own])) == 4


def test_tensors_are_on_the_device_inside_and_the_hosts_outside() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parked = Offloaded([model], "cpu")
    outside = {name: t.data_ptr() for name, t in model.state_dict().items()}
    for _ in range(2):
        with parked.here():
            inside = model.state_dict()
            assert all(
                torch.equal(inside[name], t) and inside[name].stride() == t.stride() for name, t in before.items()
            )
            assert not {t.data_ptr() for t in inside.values()} & set(outside.values())
        assert {name: t.data_ptr() for name, t in model.state_dict().items()} == outside


def test_a_run_with_offloaded_rewards_is_the_same(tmp_path: Path) -> None:
    found = []
    for more in ([], ["rewards.offload=true"]):
        loop = LocalLoop(small_config(tmp_path, "flowbp_sparse", "rewards.balance=grad_norm", *more))
        loop.step(0)
        found.append(loop.learner.digest())
    assert found[0] == found[1]


def test_what_waits_on_the_host_is_planned_there(tmp_path: Path) -> None:
    plain, parked = (
        small_config(tmp_path, "flowbp_sparse", "rewards.gpus=1", *more) for more in ([], ["rewards.offload=true"])
    )
    costs = Costs(plain)
    sizes = Sizes.of(plain, costs)
    held, waiting = (reward_memory.rewards(config, costs, sizes) for config in (plain, parked))
    assert waiting.held("") == 0 and held.held("") == waiting.held("", "host") > 0
    assert held.held("scoring") == waiting.held("scoring")
