"""What a run measured on held-out prompts, and the pictures of it, of a run that has ended or not, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zipfile import BadZipFile

import numpy as np

from flowbp_ray.artifacts.report import Evaluations, compare
from flowbp_ray.control import guard
from flowbp_ray.evaluation.estimates import Evaluation
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.run.folder import Run
from flowbp_ray.run.pictures import read_grid

Part = Mapping[str, Mapping[str, Any]]
"""before, after and change, each by metric, as `report.compare` returns it."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, BadZipFile)
"""What a file raises that was torn by a kill, or is being written."""


@dataclass(frozen=True)
class HeldOut:
    """Measurements before and after.

    first, last: the steps after which they were made; last is None where nothing was measured after the first.
    parts: by guidance; of a guidance that was measured before only, "after" and "change" are empty. source: which file
    says so. values: evaluations of single pictures, by step and guidance, where a checkpoint holds them.
    """

    first: int | None = None
    last: int | None = None
    parts: Mapping[float, Part] = field(default_factory=dict)
    source: str = ""
    values: Evaluations = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Pictures [H, W, 3] uint8 of one prompt from one noise; after is None where there is none yet.

    number: of the held-out prompt. text: None where the prompts are not known any more. scores: per metric, before and
    after.
    """

    number: int
    text: str | None
    before: np.ndarray
    after: np.ndarray | None
    scores: Mapping[str, tuple[float, float]]


def read_held_out(run: Run, held_out: Sequence[PromptRecord], finished: bool) -> HeldOut:
    """What was measured: by summary.json of a finished run, else by the newest checkpoint, else by metrics.jsonl.

    held_out: the prompts; none where they are not known any more, and then a checkpoint says nothing by skill.
    metrics.jsonl has means without intervals.
    """
    lines = [line for line in run.metrics() if line["kind"] == "evaluation"]
    steps = sorted({int(line["step"]) for line in lines})
    verdict, values = guard.read(run), _values(run, held_out)
    back = verdict["best"] if verdict is not None and verdict["action"] == "rollback" else None
    if finished and steps and (parts := _summary(run)):
        last = steps[-1] if back is None else back
        return HeldOut(steps[0], last, parts, "summary.json", values)
    if len(values) > 1 or (values and len(steps) < 2):
        first, last = min(values), max(values) if back is None or back not in values else back
        later = values[last] if last > first else {}
        parts = {g: _compared(before, later.get(g)) for g, before in values[first].items()}
        return HeldOut(first, last if later else None, parts, "the newest checkpoint", values)
    if not steps:
        return HeldOut()
    first, last = steps[0], steps[-1]
    means = {step: _means([line for line in lines if line["step"] == step]) for step in (first, last)}
    parts = {}
    for guidance, before in means[first].items():
        after = means[last].get(guidance, {}) if last > first else {}
        parts[guidance] = {"before": before, "after": after, "change": {}}
    return HeldOut(first, last if last > first else None, parts, "metrics.jsonl", values)


def _compared(before: Evaluation, after: Evaluation | None) -> Part:
    """`compare`, also of what was measured before only."""
    alone = compare(before, before)["before"]
    return {"before": alone, "after": {}, "change": {}} if after is None else compare(before, after)


def _summary(run: Run) -> dict[float, Part]:
    """The comparisons in summary.json by guidance; none where it is missing or torn."""
    try:
        found = json.loads((run.folder / "summary.json").read_text())["guidance"]
        return {float(guidance): part for guidance, part in found.items()}
    except UNREADABLE:
        return {}


def _values(run: Run, held_out: Sequence[PromptRecord]) -> Evaluations:
    """The evaluations in the newest checkpoint that can be read."""
    for step in reversed(run.checkpoints.steps()):
        evaluator = Evaluator(run.config, run, held_out, offset=0)
        try:
            evaluator.load(run.checkpoints.evaluations(step))
        except UNREADABLE:
            continue
        return evaluator.results
    return {}


def _means(lines: Sequence[Mapping[str, Any]]) -> dict[float, dict[str, Any]]:
    """Means by guidance and metric of an evaluation's lines, as estimates without interval."""
    about = ("step", "kind", "guidance")
    return {
        float(line["guidance"]): {
            name: {"mean": mean, "low": None, "high": None} for name, mean in line.items() if name not in about
        }
        for line in lines
    }


def read_pairs(run: Run, found: HeldOut, held_out: Sequence[PromptRecord], guidance: float) -> list[Pair]:
    """The pictures before and after at a guidance, in the order of the sheets in images/; none without the first."""
    before = _sheet(run, found.first, guidance)
    after = _sheet(run, found.last, guidance)
    if len(after) != len(before):  # another number of pictures is of other prompts
        after = []
    numbers = [i * len(held_out) // len(before) for i in range(len(before))] if held_out else range(len(before))
    pairs = []
    for place, (number, picture) in enumerate(zip(numbers, before, strict=True)):
        pairs.append(
            Pair(
                number=number,
                text=held_out[number].text if held_out else None,
                before=picture,
                after=after[place] if after else None,
                scores=_scores(found, guidance, number) if held_out else {},
            )
        )
    return pairs


def _sheet(run: Run, step: int | None, guidance: float) -> list[np.ndarray]:
    model = run.config.backbone
    if step is None:
        return []
    try:
        return read_grid(run.images / f"step_{step:06d}_guidance_{guidance:g}.png", model.height, model.width)
    except UNREADABLE:
        return []


def _scores(found: HeldOut, guidance: float, number: int) -> dict[str, tuple[float, float]]:
    """Of one picture, per metric, before and after; what is not finite is left out."""
    ends = [found.values.get(step, {}).get(guidance) for step in (found.first, found.last) if step is not None]
    if len(ends) < 2 or ends[0] is None or ends[1] is None:
        return {}
    first, last = ends[0].values, ends[1].values
    both = {name: (float(first[name][number]), float(last[name][number])) for name in first if name in last}
    return {name: pair for name, pair in both.items() if np.isfinite(pair).all()}
