"""How much each role computes for a step, and how many of each keep each other busy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowbp_ray.backbones.base import Backbone
from flowbp_ray.backbones.decoding import Decoding
from flowbp_ray.backbones.guidance import held_branches, held_guidance, one_branch
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs, largest, noised_times, penalised_junctions
from flowbp_ray.planning.memory import decoded_at_once

CLOSE = 0.9
"""Small counts are good enough where they reach this share of the throughput of perfectly divided work."""


@dataclass(frozen=True)
class Work:
    """The work of one role in one optimizer step, the whole pool together."""

    role: str
    what: str
    """What one call does."""
    calls: int
    """How often it is called."""
    rows: int
    """Rows of all calls together."""
    forwards: float
    """The same work in single rows of a forward without gradient (of the transformer, or of the decoder)."""
    flops: int
    """Floating-point operations."""
    time: float
    """Relative time: flops, where those in fp32 count twice beside others in bf16."""


def work(config: RunConfig, costs: Costs) -> tuple[Work, Work, Work]:
    """Samplers, learners and reward servers, in this order; evaluations and the rewards' own models are not counted."""
    return _sampling(config, costs), _learning(config, costs), _scoring(config, costs)


def _sampling(config: RunConfig, costs: Costs) -> Work:
    model, at_once = config.backbone, config.data.sampled_at_once
    branches = 1 if one_branch(costs.backbone, model.guidance) else 2
    apart = 1 if costs.backbone.joint_branches else branches
    calls, rows = sampled(config, costs.backbone)
    flops = costs.rollout(config, at_once, model.guidance).flops * rows // (at_once * branches)
    return Work(
        "samplers", f"forward, {at_once * branches // apart} rows", calls, rows, float(rows), flops, float(flops)
    )


def sampled(config: RunConfig, backbone: Backbone) -> tuple[int, int]:
    """(calls, rows) of the samplers' forwards in a step; a negative branch is a row more."""
    model, shape, method = config.backbone, config.data.shape, config.surrogate()
    at_once = config.data.sampled_at_once
    parts, steps = shape.batch // at_once, method.mean_stop(model.num_steps, at_once) + method.renoised
    branches = 1 if one_branch(backbone, model.guidance) else 2
    calls, rows = round(parts * steps), round(shape.batch * steps * branches)
    calls *= 1 if backbone.joint_branches else branches
    times = noised_times(config)  # conditional forwards of the policy that sampled
    calls, rows = calls + parts * times, rows + shape.batch * times
    if config.learners.base_penalty is not None:  # the base at each active state; without any, at the noised samples
        budget = method.max_terms(model.num_steps)
        states = budget.terms + budget.junction if config.rewards.differentiable else times
        forwards, each = based(config, backbone)
        calls, rows = calls + parts * states * forwards, rows + shape.batch * states * forwards * each
    return calls, rows


def based(config: RunConfig, backbone: Backbone) -> tuple[int, int]:
    """(forwards, rows of each per state) of the base: as a learner's, or guided by `base_penalty.guidance`."""
    detach, (learned, held) = config.backbone.detach_negative, held_guidance(config)
    if held != learned:
        branches = held_branches(backbone, learned, detach, held)
        return (1, branches) if backbone.joint_branches else (branches, 1)
    if one_branch(backbone, learned):
        return 1, 1
    if not detach:
        return (1, 2) if backbone.joint_branches else (2, 1)
    return (1, 1) if backbone.linear_guidance else (2, 1)


def _learning(config: RunConfig, costs: Costs) -> Work:
    at_once, flops, forward = 0, 0, _forward(config, costs)
    (calls, rows), (forward_calls, forward_rows) = _surrogate_calls(config), _forward_calls(config)
    if calls:
        at_once = largest(config)
        flops += costs.node(config).flops * rows // at_once
    if forward_calls:
        together = config.learners.micro_batch * config.learners.fuse
        flops += costs.forward_node(config).flops * forward_rows // together
        at_once = max(at_once, together)
    calls, rows = calls + forward_calls, rows + forward_rows
    return Work("learners", f"forward + backward, {at_once} rows", calls, rows, flops / forward, flops, float(flops))


def swept(config: RunConfig) -> tuple[int, int]:
    """(calls, rows) of the learners' forwards in a step, on all ranks; rows that only pad are computed and count.

    With terms without gradient, where every prompt's images have scores and differ.
    """
    (calls, rows), (forward_calls, forward_rows) = _surrogate_calls(config), _forward_calls(config)
    return calls + forward_calls, rows + forward_rows


def _forward_calls(config: RunConfig) -> tuple[int, int]:
    """(calls, rows) at the noised samples: those of all times of a rank's images, in calls of micro_batch × fuse."""
    learners, batch, times = config.learners, config.data.shape.batch, noised_times(config)
    per_rank = math.ceil(batch // learners.count * times / (learners.micro_batch * learners.fuse))
    return learners.count * per_rank, batch * times


def _surrogate_calls(config: RunConfig) -> tuple[int, int]:
    """(calls, rows) of the surrogate's sweeps; (0, 0) where no term is backpropagated."""
    learners, batch = config.learners, config.data.shape.batch
    budget = config.surrogate().max_terms(config.backbone.num_steps)
    per_group = math.ceil(budget.terms / learners.fuse) + budget.junction
    per_row = budget.terms + budget.junction + penalised_junctions(config)
    return batch // learners.micro_batch * per_group, batch * per_row


def _forward(config: RunConfig, costs: Costs) -> float:
    """Operations of one row of the transformer without gradient."""
    rows, guidance = config.data.sampled_at_once, config.backbone.guidance
    branches = 1 if one_branch(costs.backbone, guidance) else 2
    return costs.rollout(config, rows, guidance).flops / (rows * branches)


def _scoring(config: RunConfig, costs: Costs) -> Work:
    rows, at_once = config.data.shape.batch * config.surrogate().branches, decoded_at_once(config)
    how = Decoding.of(config.rewards)
    backward = bool(config.rewards.differentiable)
    cost, forward = costs.decoding(at_once, backward, how), costs.decoding(at_once, False, how)
    per_item = math.ceil(config.data.rollout_batch * config.surrogate().branches / at_once)
    flops = cost.flops * rows // at_once
    slower = how.dtype.itemsize / config.backbone.torch_dtype.itemsize if config.rewards.gpus else 1.0
    what = f"decoding{' + backward' if backward else ''}, {at_once} images"
    calls = config.data.shape.items * per_item
    return Work("reward servers", what, calls, rows, rows * cost.flops / forward.flops, flops, flops * slower)


def ratio(times: Sequence[float]) -> tuple[int, ...]:
    """The smallest counts (samplers, learners, reward servers) that keep the roles busy, by their relative times."""
    least = len(times)
    for total in range(least, 8 * least + 1):
        counts = split(times, total)
        if balance(times, counts) >= CLOSE:
            return counts
    return max((split(times, total) for total in range(least, 8 * least + 1)), key=lambda c: balance(times, c))


def split(times: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` processes divided over the roles, at least one each, so that the slowest role is as fast as possible."""
    counts = [1] * len(times)
    for _ in range(total - len(times)):
        slowest = max(range(len(times)), key=lambda i: times[i] / counts[i])
        counts[slowest] += 1
    return tuple(counts)


def balance(times: Sequence[float], counts: Sequence[int]) -> float:
    """Throughput relative to that of as many processes which share all work perfectly, in 0..1."""
    return sum(times) / sum(counts) / max(time / count for time, count in zip(times, counts, strict=True))
