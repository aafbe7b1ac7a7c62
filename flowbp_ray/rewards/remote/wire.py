"""The messages between a run and a reward server, and what both sides must know of their HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from flowbp_ray.messages import Evaluated, Item, Packed, RolloutReport, Scored, Version

DIGEST = "Flowbp-Ray-Digest"  # header of a request: the server's settings that the run has agreed with
HEALTH_TIME = 10.0  # seconds for an answer of /health
LARGEST_LINE = 1 << 20  # bytes of an answer that holds no arrays: /health, and what is wrong


@dataclass(frozen=True)
class Request:
    """What both requests state of an item."""

    purpose: str
    step: int
    index: int
    seed: int
    prompt_ids: tuple[int, ...]
    samples: tuple[int, ...]
    prompts: tuple[str, ...]

    def item(self) -> Item:
        """The item, without plans and weights: those stay where it is rolled out and learned from."""
        return Item(
            purpose=self.purpose,
            step=self.step,
            index=self.index,
            prompt_ids=self.prompt_ids,
            samples=self.samples,
            plans=(),
            seed=self.seed,
            num_steps=0,
            guidance=1.0,
            version=Version(0, 0),
        )


def _said(item: Item, prompts: Sequence[str]) -> dict[str, Any]:
    """The fields of `Request`."""
    said = {field.name: getattr(item, field.name) for field in fields(Request) if field.name != "prompts"}
    return said | {"prompts": tuple(prompts)}


@dataclass(frozen=True)
class ScoreRequest(Request):
    """What `Scorer.score` reads of an item, its rollout's report and its targets.

    batch: rows of the global batch. omega [rows] fp64; kept [rows] bool; target [rows, branches, C, h, w].
    """

    batch: int
    omega: np.ndarray
    kept: np.ndarray
    target: Packed

    @classmethod
    def of(cls, item: Item, prompts: Sequence[str], report: RolloutReport, target: Packed, batch: int) -> ScoreRequest:
        omega, kept = np.array(report.omega, dtype=np.float64), np.array(report.kept, dtype=bool)
        return cls(**_said(item, prompts), batch=batch, omega=omega, kept=kept, target=target)

    def report(self) -> RolloutReport:
        """A report with omega and kept, and nothing of what a scorer does not read."""
        omega, kept, none = tuple(self.omega.tolist()), tuple(self.kept.tolist()), 0
        return RolloutReport(self.step, self.index, Version(0, 0), omega, (), kept, *(none,) * 5, 0.0, 0.0)


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """What `Scorer.evaluate` reads of an item and its finished latents [rows, C, h, w]."""

    latents: Packed

    @classmethod
    def of(cls, item: Item, prompts: Sequence[str], latents: Packed) -> EvaluateRequest:
        return cls(**_said(item, prompts), latents=latents)


@dataclass(frozen=True)
class ScoreAnswer:
    """What `Scorer.score` returns."""

    scored: Scored
    cotangent: Packed


@dataclass(frozen=True)
class EvaluateAnswer:
    """What `Scorer.evaluate` returns."""

    evaluated: Evaluated


def reason(content: bytes) -> str:
    """The line in which a server says what is wrong."""
    try:
        plain: Any = json.loads(content)
        text = str(plain["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content[:200].decode(errors="replace")
    return " ".join(text.split())[:300] or "nothing"


def line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
