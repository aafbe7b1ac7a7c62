"""GenEval's decision on what a detector found in one picture: pure functions, no model.

The rules and numbers are those of djghosh13/geneval, evaluation/evaluate_images.py (arXiv 2310.11513, section 3): all
`include` and all `exclude` must hold; colour and position are asked of the surest detections only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowbp_ray.rewards.geneval.prompts import Task, Wanted

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Detection:
    """One object that was found. mask: [H, W] bool of the whole picture, where the detector draws one."""

    noun: str
    score: float
    box: Box
    mask: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Thresholds:
    """The published numbers. score, counting: a detection counts above this, and in tasks tagged `counting` above that.

    objects: kept per class. overlap: of two of a class whose boxes overlap (IoU) this much or more the surer one stays;
    1 keeps both. position: share of both boxes' extent by which a centre must be beside the other.
    """

    score: float = 0.3
    counting: float = 0.9
    objects: int = 16
    overlap: float = 1.0
    position: float = 0.1

    def __post_init__(self) -> None:
        for name in ("score", "counting", "overlap"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"GenEval's threshold {name} must lie in 0..1, got {getattr(self, name)}")
        if self.objects < 1 or self.position < 0:
            raise ValueError(f"GenEval needs objects >= 1 and position >= 0, got {self.objects} and {self.position}")

    def of(self, tag: str) -> float:
        """The score that detections must exceed for a task of this tag."""
        return self.counting if tag == "counting" else self.score


@dataclass(frozen=True)
class GenEvalVerdict:
    """Whether everything held, and else what did not, a line each."""

    correct: bool
    reasons: tuple[str, ...] = ()


Colours = Callable[[str, Sequence[Detection]], Sequence[str]]  # a class and its detections -> the colour of each


def keep(found: Iterable[Detection], tag: str, thresholds: Thresholds) -> dict[str, list[Detection]]:
    """Class -> the detections that count for a task, surest first."""
    by_noun: dict[str, list[Detection]] = {}
    for detection in sorted(found, key=lambda d: -d.score):
        if detection.score > thresholds.of(tag):
            by_noun.setdefault(detection.noun, []).append(detection)
    return {noun: _apart(some[: thresholds.objects], thresholds.overlap) for noun, some in by_noun.items()}


def _apart(found: Sequence[Detection], overlap: float) -> list[Detection]:
    """Greedy non-maximum suppression of one class, surest first; overlap 1 leaves all."""
    if overlap == 1.0:
        return list(found)
    kept: list[Detection] = []
    for detection in found:
        if all(iou(detection.box, other.box) < overlap for other in kept):
            kept.append(detection)
    return kept


def iou(a: Box, b: Box) -> float:
    """Intersection over union of boxes whose last pixel counts: sides are right − left + 1, as published."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0.0) * max(bottom - top + 1, 0.0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box, threshold: float = 0.1) -> set[str]:
    """Where a lies relative to b: left of, right of, above, below; two of them on a diagonal, none where too close.

        o = centre(a) − centre(b);   r = sign(o) · max(|o| − threshold · (size(a) + size(b)), 0);   d = r / ‖o‖
        left of: d_x < −1/2,  right of: d_x > 1/2,  above: d_y < −1/2,  below: d_y > 1/2

    The slack is taken off each axis, the length is that of the whole offset (evaluate_images.py, relative_position).
    """
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    slack = [threshold * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, slack, strict=True)]
    if all(abs(r) < 1e-3 for r in beyond):  # a thousandth of a pixel, which also spares a division by zero
        return set()
    dx, dy = (r / math.hypot(*offset) for r in beyond)
    where = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in where.items() if true}


def verdict(
    task: Task, found: Mapping[str, Sequence[Detection]], colours: Colours, thresholds: Thresholds | None = None
) -> GenEvalVerdict:
    """Judge one picture by what `keep` left of its detections.

    colours is asked only where a colour is wanted, and then of the `count` surest objects of the class.
    """
    threshold = (thresholds or Thresholds()).position
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # of each include: its objects, or None where it failed
    for wanted in task.include:
        some = found.get(wanted.noun, ())[: wanted.count]
        wrong = _wrong(wanted, some, groups, colours, threshold)
        groups.append(None if wrong else some)
        reasons += wrong
    for unwanted in task.exclude:
        if (there := len(found.get(unwanted.noun, ()))) >= unwanted.count:
            reasons.append(f"{there} × {unwanted.noun} where fewer than {unwanted.count} are asked for")
    return GenEvalVerdict(not reasons, tuple(reasons))


def _wrong(
    wanted: Wanted,
    some: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colours: Colours,
    threshold: float,
) -> list[str]:
    """What is wrong with one include: too few, else the colour, else the position."""
    if len(some) < wanted.count:
        return [f"{len(some)} × {wanted.noun} where {wanted.count} are asked for"]
    if wanted.colour is not None:
        seen = list(colours(wanted.noun, some))
        if seen.count(wanted.colour) < wanted.count:
            return [f"{wanted.noun} is {', '.join(seen)} where {wanted.colour} is asked for"]
    if wanted.position is not None:
        relation, target = wanted.position
        others = groups[target]
        if others is None:
            return [f"nothing for {wanted.noun} to be {relation}"]
        for one in some:
            for other in others:
                true = relations(one.box, other.box, threshold)
                if relation not in true:
                    seen_at = " and ".join(sorted(true)) or "too close to be beside"
                    return [f"{wanted.noun} is {seen_at} {other.noun} where {relation} is asked for"]
    return []
