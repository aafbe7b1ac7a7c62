"""What travels between a run and a reward server: requests, and answers with `Scored` and `Evaluated` as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowbp_ray.messages import Evaluated, Item, Packed, RolloutReport, Scored, Version


@dataclass(frozen=True)
class ScoreRequest:
    """What `Scorer.score` reads of an item, its rollout's report and its targets.

    batch: rows of the global batch. omega [rows] fp64; kept [rows] bool; target [rows, branches, C, h, w].
    """

    purpose: str
    step: int
    index: int
    seed: int
    prompt_ids: tuple[int, ...]
    samples: tuple[int, ...]
    prompts: tuple[str, ...]
    batch: int
    omega: np.ndarray
    kept: np.ndarray
    target: Packed

    @classmethod
    def of(cls, item: Item, prompts: Sequence[str], report: RolloutReport, target: Packed, batch: int) -> ScoreRequest:
        return cls(
            *(item.purpose, item.step, item.index, item.seed, item.prompt_ids, item.samples, tuple(prompts), batch),
            np.array(report.omega, dtype=np.float64),
            np.array(report.kept, dtype=bool),
            target,
        )

    def report(self) -> RolloutReport:
        """A report with omega and kept, and nothing of what a scorer does not read."""
        omega, kept, none = tuple(self.omega.tolist()), tuple(self.kept.tolist()), 0
        return RolloutReport(self.step, self.index, Version(0, 0), omega, (), kept, *(none,) * 5, 0.0, 0.0)


@dataclass(frozen=True)
class EvaluateRequest:
    """What `Scorer.evaluate` reads of an item and its finished latents [rows, C, h, w]."""

    purpose: str
    step: int
    index: int
    seed: int
    prompt_ids: tuple[int, ...]
    samples: tuple[int, ...]
    prompts: tuple[str, ...]
    latents: Packed

    @classmethod
    def of(cls, item: Item, prompts: Sequence[str], latents: Packed) -> EvaluateRequest:
        common = (item.purpose, item.step, item.index, item.seed, item.prompt_ids, item.samples)
        return cls(*common, tuple(prompts), latents)


@dataclass(frozen=True)
class ScoreAnswer:
    """What `Scorer.score` returns."""

    scored: Scored
    cotangent: Packed


@dataclass(frozen=True)
class EvaluateAnswer:
    """What `Scorer.evaluate` returns."""

    evaluated: Evaluated


def item_of(request: ScoreRequest | EvaluateRequest) -> Item:
    """The item of a request, without plans and weights: those stay where it is rolled out and learned from."""
    return Item(
        purpose=request.purpose,
        step=request.step,
        index=request.index,
        prompt_ids=request.prompt_ids,
        samples=request.samples,
        plans=(),
        seed=request.seed,
        num_steps=0,
        guidance=1.0,
        version=Version(0, 0),
    )
