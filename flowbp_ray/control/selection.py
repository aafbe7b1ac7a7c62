"""The selection of a batch's samples and their factors, and the check whether the learners updated."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.config.sections import NonFinite
from flowbp_ray.messages import Fault, ScoredItem, StepReport
from flowbp_ray.rewards import balance
from flowbp_ray.utils.errors import RunFailed


@dataclass(frozen=True)
class Selection:
    """The rows of a batch that count, and by how much.

    factors: multiply each row's cotangent, 0 or batch / kept, so that the loss is a mean over the kept rows. kept:
    their number. faults: of the rollouts and scores. gram: [terms, terms], the inner products of the rewards' gradients
    over these rows. shares: multiply each term's cotangent if the rewards are balanced; else empty, with one cotangent
    for all terms.
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
        """Compute `kept`, `gram` and `shares` from the rows' factors."""
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
    """Drop rows with a fault, beyond their method's `max_distance`, or with a drift above `drift_max`.

    items: in the order of their index. drift: one number per row, or empty. nonfinite: with "skip_step" one fault drops
    all rows.
    """
    faults = tuple(fault for scored in items for part in (scored.report, scored.result) for fault in part.faults)
    spoiled = {fault.sample for fault in faults}
    kept = [
        flag and sample not in spoiled
        for scored in items
        for flag, sample in zip(scored.report.kept, scored.item.samples, strict=True)
    ]
    if drift and drift_max is not None:
        # A row whose drift is NaN stays: the sweep computes the same velocity again and reports it as a fault.
        kept = [flag and not value > drift_max for flag, value in zip(kept, drift, strict=True)]
    if faults and nonfinite == "skip_step":
        kept = [False] * len(kept)
    count = sum(kept)
    return Selection.of(items, tuple(len(kept) / count if flag else 0.0 for flag in kept), faults, rewards)


def check_updated(
    step: int, learners: Sequence[StepReport], prompts: Sequence[str], nonfinite: NonFinite, log: logging.Logger
) -> bool:
    """Whether the learners updated; logs why they did not. With a gradient norm that is not finite they do not update.

    learners: empty if no sample was kept. Raises RunFailed for such a norm with nonfinite="stop".
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
