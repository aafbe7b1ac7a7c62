"""Which samples of a batch count, and by how much: the mean of the loss is taken over those that are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Fault, StepReport
from flowbp_ray.rewards import balance
from flowbp_ray.utils.errors import RunFailed


@dataclass(frozen=True)
class Selection:
    """factors: what each row's cotangent is multiplied by, 0 or batch / kept. faults: what was not finite so far.

    gram: [terms, terms], the products of the rewards' gradients over the kept rows. shares: what each term's cotangent
    is multiplied by, where the terms are balanced; else empty: there is one cotangent for all.
    """

    factors: tuple[float, ...]
    kept: int
    faults: tuple[Fault, ...]
    gram: np.ndarray
    shares: tuple[float, ...] = ()


def select(config: RunConfig, jobs: Sequence[Any], drift: Sequence[float]) -> Selection:
    """Leave out rows beyond their method's `max_distance`, with a fault, or that aged beyond `drift.max`.

    jobs: in the order of their items; each has the `report` and the `result` of its item. drift: one per row, or
    empty. With `nonfinite: skip_step` one fault leaves out all rows.
    """
    faults = tuple(f for job in jobs for part in (job.report, job.result) for f in part.faults)
    spoiled = {fault.sample for fault in faults}
    kept = [
        flag and sample not in spoiled
        for job in jobs
        for flag, sample in zip(job.report.kept, job.item.samples, strict=True)
    ]
    if drift and config.drift.max is not None:
        # a drift that is not a number stays: the sweep meets that velocity again, and names it
        kept = [flag and not aged > config.drift.max for flag, aged in zip(kept, drift, strict=True)]
    if faults and config.nonfinite == "skip_step":
        kept = [False] * len(kept)
    count = sum(kept)
    return selection(config, jobs, tuple(len(kept) / count if flag else 0.0 for flag in kept), faults)


def selection(
    config: RunConfig, jobs: Sequence[Any], factors: tuple[float, ...], faults: tuple[Fault, ...]
) -> Selection:
    """What follows from the rows' factors."""
    products = balance.gram([job.result for job in jobs], factors)
    weights = [term.weight for term in config.rewards.terms]
    shares = balance.shares(products, weights) if config.rewards.balance != "none" else ()
    return Selection(factors, sum(factor != 0 for factor in factors), faults, products, shares)


def changed(
    config: RunConfig, step: int, learners: Sequence[StepReport], prompts: Sequence[str], log: logging.Logger
) -> bool:
    """Whether the learners updated; a gradient norm that is not finite updated nothing, and the log names why.

    learners: empty where no sample was kept. Raises RunFailed for a bad gradient with `nonfinite: stop`.
    """
    updated = bool(learners) and math.isfinite(learners[0].grad_norm)
    faults = [fault.describe(prompts) for report in learners for fault in report.faults]
    for fault in faults:
        log.warning("%s", fault)
    if learners and not updated and config.nonfinite == "stop":
        why = faults[0] if faults else f"gradient of step {step} is not finite"
        raise RunFailed(f"{why}; nonfinite=skip_step would go on without the step")
    if not updated:
        log.warning("step %d changed nothing: %s", step, "bad gradient" if learners else "no sample was kept")
    return updated
