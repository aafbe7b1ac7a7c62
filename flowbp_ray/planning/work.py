"""How much each role computes for a step, and how many of each keep each other busy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowbp_ray.backbones.guidance import one_branch
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs, largest, penalised_junctions
from flowbp_ray.planning.memory import decoded_at_once

CLOSE = 0.9
"""A ratio of small numbers is good enough where no role has to wait for more than a tenth of the time."""


@dataclass(frozen=True)
class Work:
    """Of one role for one optimizer step, the whole pool together.

    what: what one call is. calls: how often it runs; rows: in how many rows altogether. forwards: the same work in
    single rows of a forward without gradient (of the transformer, or of the decoder). flops: floating-point operations;
    time: flops, those in fp32 counted twice where others run in bf16.
    """

    role: str
    what: str
    calls: int
    rows: int
    forwards: float
    flops: int
    time: float


def work(config: RunConfig, costs: Costs) -> tuple[Work, Work, Work]:
    """Samplers, learners and reward servers, in this order; evaluations and the rewards' own models are not counted."""
    return _sampling(config, costs), _learning(config, costs), _scoring(config, costs)


def _sampling(config: RunConfig, costs: Costs) -> Work:
    model, shape, method = config.backbone, config.data.shape, config.surrogate()
    steps = model.num_steps + method.renoised
    branches = 1 if one_branch(costs.backbone, model.guidance) else 2
    cost = costs.rollout(config, shape.rollout_batch, model.guidance)
    calls, rows = shape.items * steps, shape.batch * steps * branches
    what = f"forward, {shape.rollout_batch * branches} rows"
    if config.learners.base_penalty is not None:  # the base at each active state, one branch where that is trained
        budget = method.max_terms(model.num_steps)
        states, (forwards, each) = budget.terms + budget.junction, _trained(config, costs)
        calls, rows = calls + shape.items * states * forwards, rows + shape.batch * states * forwards * each
    flops = cost.flops * rows // (shape.rollout_batch * branches)
    return Work("samplers", what, calls, rows, float(rows), flops, float(flops))


def _trained(config: RunConfig, costs: Costs) -> tuple[int, int]:
    """(forwards, rows of each per state) of `trained_velocity`."""
    model = config.backbone
    if one_branch(costs.backbone, model.guidance):
        return 1, 1
    if not model.detach_negative:
        return 1, 2
    return (1, 1) if costs.backbone.linear_guidance else (2, 1)


def _learning(config: RunConfig, costs: Costs) -> Work:
    at_once, node, forward = largest(config), costs.node(config), _forward(config, costs)
    calls, rows = swept(config)
    flops = node.flops * rows // at_once
    return Work("learners", f"forward + backward, {at_once} rows", calls, rows, flops / forward, flops, float(flops))


def swept(config: RunConfig) -> tuple[int, int]:
    """Calls of the learners' sweep in a step and the rows in them, on all ranks; the rows that pad are computed too."""
    learners, batch = config.learners, config.data.shape.batch
    budget = config.surrogate().max_terms(config.backbone.num_steps)
    per_group = math.ceil(budget.terms / learners.fuse) + budget.junction
    per_row = budget.terms + budget.junction + penalised_junctions(config)
    return batch // learners.micro_batch * per_group, batch * per_row


def _forward(config: RunConfig, costs: Costs) -> float:
    """Operations of one row of the transformer without gradient."""
    rows, guidance = config.data.rollout_batch, config.backbone.guidance
    branches = 1 if one_branch(costs.backbone, guidance) else 2
    return costs.rollout(config, rows, guidance).flops / (rows * branches)


def _scoring(config: RunConfig, costs: Costs) -> Work:
    rows, at_once = config.data.shape.batch * config.surrogate().branches, decoded_at_once(config)
    cost, forward = costs.decoding(at_once, True), costs.decoding(at_once, False)
    per_item = math.ceil(config.data.rollout_batch * config.surrogate().branches / at_once)
    flops = cost.flops * rows // at_once
    slower = 4 / config.backbone.torch_dtype.itemsize if config.rewards.gpus else 1.0
    what = f"decoding + backward, {at_once} images"
    calls = config.data.shape.items * per_item
    return Work("reward servers", what, calls, rows, rows * cost.flops / forward.flops, flops, flops * slower)


def ratio(times: Sequence[float]) -> tuple[int, ...]:
    """The smallest counts of the roles that are close to their shares of the work: samplers, learners, rewards."""
    least = len(times)
    for total in range(least, 8 * least + 1):
        counts = split(times, total)
        if balance(times, counts) >= CLOSE:
            return counts
    return max((split(times, total) for total in range(least, 8 * least + 1)), key=lambda c: balance(times, c))


def split(times: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` processes over the roles, one at least each, so that the slowest is as fast as can be."""
    counts = [1] * len(times)
    for _ in range(total - len(times)):
        slowest = max(range(len(times)), key=lambda i: times[i] / counts[i])
        counts[slowest] += 1
    return tuple(counts)


def balance(times: Sequence[float], counts: Sequence[int]) -> float:
    """Throughput over what the same number of processes would reach if work could be cut at will, in 0..1."""
    return sum(times) / sum(counts) / max(time / count for time, count in zip(times, counts, strict=True))
