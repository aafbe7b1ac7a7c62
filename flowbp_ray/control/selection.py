"""Which samples of a batch count and by how much, and whether the learners updated."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.messages import Fault, ScoredItem, StepReport
from flowbp_ray.rewards import balance
from flowbp_ray.utils.errors import RunFailed

NonFinite = Literal["skip_sample", "skip_step", "stop"]
"""`nonfinite` of a configuration: what a value that is not finite costs."""


@dataclass(frozen=True)
class Selection:
    """factors: what each row's cotangent is multiplied by, 0 or batch / kept. faults: what was not finite so far.

    The mean of the loss is taken over the rows that are kept. gram: [terms, terms], the products of the rewards'
    gradients over these rows. shares: what each term's cotangent is multiplied by, where the terms are balanced; else
    empty: there is one cotangent for all.
    """

    factors: tuple[float, ...]
    kept: int
    faults: tuple[Fault, ...]
    gram: np.ndarray
    shares: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        items: Sequence[ScoredItem],
        factors: tuple[float, ...],
        faults: tuple[Fault, ...],
        rewards: RewardsConfig,
    ) -> Selection:
        """What follows from the rows' factors."""
        products = balance.gram([scored.result for scored in items], factors)
        weights = [term.weight for term in rewards.terms]
        shares = balance.shares(products, weights) if rewards.balance != "none" else ()
        return cls(factors, sum(factor != 0 for factor in factors), faults, products, shares)


def select(
    items: Sequence[ScoredItem],
    drift: Sequence[float],
    rewards: RewardsConfig,
    drift_max: float | None = None,
    nonfinite: NonFinite = "stop",
) -> Selection:
    """Leave out rows with a fault, beyond their method's `max_distance`, or whose drift is above `drift_max`.

    items: in their order. drift: one number per row, or empty. nonfinite: with "skip_step" one fault costs all rows.
    """
    faults = tuple(fault for scored in items for part in (scored.report, scored.result) for fault in part.faults)
    spoiled = {fault.sample for fault in faults}
    kept = [
        flag and sample not in spoiled
        for scored in items
        for flag, sample in zip(scored.report.kept, scored.item.samples, strict=True)
    ]
    if drift and drift_max is not None:
        # a drift that is not a number stays: the sweep meets that velocity again, and names it
        kept = [flag and not value > drift_max for flag, value in zip(kept, drift, strict=True)]
    if faults and nonfinite == "skip_step":
        kept = [False] * len(kept)
    count = sum(kept)
    return Selection.of(items, tuple(len(kept) / count if flag else 0.0 for flag in kept), faults, rewards)


def check_updated(
    step: int, learners: Sequence[StepReport], prompts: Sequence[str], nonfinite: NonFinite, log: logging.Logger
) -> bool:
    """Whether the learners updated. A gradient norm that is not finite updated nothing, and the log names why.

    learners: empty where no sample was kept. Raises RunFailed for a bad gradient with nonfinite="stop".
    """
    updated = bool(learners) and math.isfinite(learners[0].grad_norm)
    faults = [fault.describe(prompts) for report in learners for fault in report.faults]
    for fault in faults:
        log.warning("%s", fault)
    if learners and not updated and nonfinite == "stop":
        why = faults[0] if faults else f"gradient of step {step} is not finite"
        raise RunFailed(f"{why}; nonfinite=skip_step would go on without the step")
    if not updated:
        log.warning("step %d changed nothing: %s", step, "bad gradient" if learners else "no sample was kept")
    return updated
