"""The selection of a batch's samples and their factors, and the check whether the learners updated."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import NonFinite
from flowbp_ray.control.optimality import Compared, compare
from flowbp_ray.messages import Fault, Optimality, ScoredItem, StepReport
from flowbp_ray.rewards import balance
from flowbp_ray.utils.errors import RunFailed

SKIPS = 10  # consecutive steps without an update after which a run fails


@dataclass(frozen=True)
class Selection:
    """The rows of a batch that count, and by how much.

    factors: multiply each row's cotangent, 0 or batch / kept, so that the loss is a mean over the kept rows. kept:
    their number. faults: of the rollouts and scores. gram: [terms, terms], the inner products of the rewards' gradients
    over these rows. shares: multiply each term's cotangent if the rewards are balanced; else empty, with one cotangent
    for all terms. judged: scores of the rows by judges, by term; NaN where there is none. compared: with terms without
    gradient, the rows beside the others of their prompts. surrogate: whether any term is backpropagated.
    """

    factors: tuple[float, ...]
    kept: int
    faults: tuple[Fault, ...]
    gram: np.ndarray
    shares: tuple[float, ...] = ()
    judged: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    compared: Compared | None = None
    surrogate: bool = True

    @property
    def trains(self) -> bool:
        """Whether there is anything to learn from."""
        taught = self.compared is not None and bool(np.isfinite(self.compared.rows).any())
        return self.kept > 0 and (self.surrogate or taught)

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
        weights = [term.weight for term in rewards.differentiable]
        shares = balance.shares(products, weights) if rewards.balance != "none" else ()
        return cls(factors, sum(factor != 0 for factor in factors), faults, products, shares)

    def beside(self, items: Sequence[ScoredItem], config: RunConfig) -> Selection:
        """With terms without gradient: the same with `compared`. Call it once the factors and `judged` are known."""
        terms, nft = config.rewards.scored, config.nft
        if not terms:
            return self
        scores = [self.judged.get(term.name) or _scores(items, term.name) for term in terms]
        weights, kept = [term.weight for term in terms], [factor != 0 for factor in self.factors]
        compared = compare(scores, weights, config.data.images_per_prompt, kept, nft.clip, nft.std)
        return replace(self, compared=compared, surrogate=bool(config.rewards.differentiable))

    def optimality(self, ranks: int, config: RunConfig) -> list[Optimality] | list[None]:
        """Each rank's part of `compared`, in order; None for all where it teaches nothing."""
        if self.compared is None or not np.isfinite(self.compared.rows).any():
            return [None] * ranks
        parts = np.split(self.compared.rows, ranks)
        slots = max(int(np.isfinite(part).sum()) for part in parts) * config.nft.times
        weight = sum(term.weight for term in config.rewards.scored)
        return [Optimality(tuple(part.tolist()), weight, slots) for part in parts]


def _scores(items: Sequence[ScoredItem], name: str) -> tuple[float, ...]:
    return tuple(row[0] for scored in items for row in scored.result.scores[name])


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
        log.warning(
            "step %d changed nothing: %s", step, "bad gradient" if learners else "nothing to learn from was kept"
        )
    return updated
