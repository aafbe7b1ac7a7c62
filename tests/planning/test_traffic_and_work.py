"""Bytes, calls and operations against a real sweep and PyTorch's counter."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowbp_ray.backbones.guidance import full_velocity
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config import loading
from flowbp_ray.observability.step_metrics import state_bytes
from flowbp_ray.planning import memory
from flowbp_ray.planning.costs import Costs, largest
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.planning.traffic import between_learners, traffic
from flowbp_ray.planning.work import balance, ratio, split, swept, work
from flowbp_ray.rollout.items import plans_of_step
from flowbp_ray.surrogate import Cache, gather_states, sweep
from tests.planning.common import config_of

PENALISED = ["learners.base_penalty.weight=1", "learners.fuse=1"]


@pytest.mark.parametrize(
    ("method", "extra"),
    [*((name, []) for name in ("flowbp_sparse", "flowbp_bridge", "draft_lv", "refl")), ("flowbp_bridge", PENALISED)],
)
def test_bytes_and_calls_are_those_of_a_real_step(method: str, extra: list[str]) -> None:
    config = loading.load(f"shapes_{method}", extra)
    costs, named = Costs(config), config.surrogate()
    model, batch = config.backbone, config.data.shape.batch
    sigmas = costs.backbone.sigmas(model.num_steps, 64, 64)
    plans = plans_of_step(named, sigmas, config.plan_seed, 0, batch)
    moved = traffic(config, costs, memory.Sizes.of(config, costs), 0)
    assert moved.states == state_bytes(config.backbone, plans) and moved.base == (moved.states if extra else 0)
    assert moved.per_update == sum(p.nbytes for p in costs.backbone.load_transformer(torch.float32).parameters())

    rows = batch // config.learners.count
    latent = costs.latent_shape
    fresh = torch.zeros(named.renoised, rows, *latent) if named.renoised else None
    cache = Cache(sigmas, torch.zeros(len(sigmas), rows, *latent), torch.zeros(len(sigmas) - 1, rows, *latent))
    cache = Cache(sigmas, cache.x, cache.v, y=fresh, v_y=fresh)
    states = gather_states(plans[:rows], cache)
    scale, seen = torch.ones((), requires_grad=True), []

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        seen.append(len(x))
        return x * scale

    report = sweep(
        velocity,
        plans[:rows],
        states,
        torch.zeros(rows, named.branches, *latent),
        micro_batch=config.learners.micro_batch,
        fuse=config.learners.fuse,
        terms_per_sample=named.max_terms(model.num_steps).terms,
        penalty=(lambda position, v: torch.zeros_like(v)) if extra else None,
    )
    shape, at_once = config.data.shape, config.data.rollout_batch
    drawn = [plans_of_step(named, sigmas, config.plan_seed, i, batch) for i in range(400)]
    stops = [sum(max(p.stop for p in step[i : i + at_once]) for i in range(0, batch, at_once)) for step in drawn]
    based = len(plans[0].states) if extra else 0
    counted = np.mean(stops) + shape.items * (named.renoised + based)
    assert abs(work(config, costs)[0].calls - counted) <= 0.5 + 4 * np.std(stops) / len(stops) ** 0.5
    assert largest(config) >= max(seen) and (max(seen) == largest(config) or not extra)
    assert swept(config) == (report.forwards * config.learners.count, report.rows * config.learners.count)


def test_operations_are_those_of_the_flop_counter(folders: Any) -> None:
    whole, bare = folders("sd35")
    config = config_of("sd35", bare)
    backbone, model = backbone_named("sd35", str(whole)), config.backbone
    module = backbone.load_transformer(torch.float32)
    cond = {k: torch.randn(2, *t.shape[1:]) for k, t in backbone.conditioning_skeleton().items()}
    velocity = full_velocity(backbone, module, torch.linspace(1, 0, 26), cond, cond, model.guidance)
    x = torch.randn(2, *backbone.latent_shape(model.height, model.width))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity(x, torch.zeros(2, dtype=torch.long), torch.arange(2))
    costs = Costs(config)
    assert costs.rollout(config, 2, model.guidance).flops == counter.get_total_flops()
    sampling, learning, _ = work(config, costs)
    assert sampling.forwards == 16 * 25 * 2
    assert 3.0 < learning.forwards / learning.rows < 4.5  # forward, backward and, checkpointed, the forward again
    without = config_of("sd35", bare, "learners.gradient_checkpointing=false")
    assert 2.5 < work(without, costs)[1].forwards / learning.rows < 3.5


def test_the_ratio_keeps_the_roles_busy() -> None:
    assert ratio([3.0, 1.0, 1.0]) == (3, 1, 1) and split([3.0, 1.0, 1.0], 10) == (6, 2, 2)
    assert balance([3.0, 1.0, 1.0], (3, 1, 1)) == 1.0 and balance([2.0, 1.0, 1.0], (1, 1, 1)) == pytest.approx(2 / 3)


def test_a_forecast_counts_every_process_on_the_host(folders: Any) -> None:
    cpus = ["samplers.gpus=0", "learners.gpus=0", "rewards.gpus=0", "learners.count=2"]
    plan = forecast(config_of("flux1", folders("flux1")[1], *cpus))
    assert [role.count for role in plan.roles] == [8, 2, 2] and not any(role.overhead for role in plan.roles)
    assert plan.host > sum(role.count * role.nbytes for role in plan.roles) + plan.traffic.in_flight
    assert json.loads(json.dumps(plan.to_dict()))["roles"][1]["bytes"] == plan.roles[1].nbytes


def test_learners_exchange_what_zero_says(folders: Any) -> None:
    """2 Ψ a step for plain data parallelism and stages 1 and 2, 3 Ψ for stage 3 (1910.02054 §7), with one backward.

    With more of them per step, stages 2 and 3 exchange gradients in each, and stage 3 the weights twice.
    """
    sizes = memory.Sizes(8 * 10**6, 8 * 10**6, 0, {}, 0)
    for method in ("refl", "draft_lv"):
        found = {}
        for stage in (0, 1, 2, 3):
            config = config_of("sd35", folders("sd35")[1], f"learners.zero={stage}", method=method)
            calls = swept(config)[0] // config.learners.count
            found[stage] = between_learners(config, sizes) / (8 * 10**6 * 4 * 7 / 8)
        assert found == {0: 2, 1: 2, 2: 1 + calls, 3: 3 * calls}
        if method == "refl":
            assert found[2] == 2 and found[3] == 3


def test_samplers_that_compute_items_in_parts_need_what_items_of_that_size_do() -> None:
    """Forwards and memory depend on the rows at a time; what travels with an item does not matter to them."""
    small, parts = (
        loading.load("shapes_flowbp_sparse", ["data.prompts_per_step=32", *sizes])
        for sizes in (["data.rollout_batch=4"], ["data.rollout_batch=16", "data.rollout_micro_batch=4"])
    )
    whole = loading.load("shapes_flowbp_sparse", ["data.prompts_per_step=32", "data.rollout_batch=16"])
    roles, works = [], []
    for config in (small, parts, whole):
        costs = Costs(config)
        roles.append(memory.samplers(config, costs, memory.Sizes.of(config, costs)))
        works.append(work(config, costs)[0])
    assert roles[0] == roles[1] != roles[2] and works[0] == works[1] != works[2]
