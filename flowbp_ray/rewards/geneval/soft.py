"""GenEval's rules with a gradient: the logarithm of the probability that a picture shows what its prompt lists.

The yes or no of each rule (`flowbp_ray.rewards.geneval.verdict`) becomes a probability, and since all must hold they
multiply. With t the threshold on scores and tau the softness:

    P(object k is there)   p[k] = sigmoid((logit s[k] - logit t) / (SCORE tau))
    P(low <= how many < high)   exactly, of independent objects (the Poisson-binomial distribution)
    P(colour c)            softmax over the ten colours of (CLIP's scale * cosine / tau)
    P(a beside b)          sigmoid(beyond / (PLACE tau)), `beyond` as in `log_beside`

What is asked of which object, and which objects are looked at, is decided as the verdict does: the surest first. As tau
falls to 0 the probability becomes 1 where the verdict is yes, and 0 where it is no. Logarithms are summed throughout,
so that the gradient of what is all but absent is not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards.geneval.prompts import Task
from flowbp_ray.rewards.geneval.verdict import Thresholds, iou

SCORE = 0.25  # of the logit of a score: a hundred queries of score 0.02 together are nearly nothing
PLACE = 0.02  # of the picture's longer side
ABSENT = -20.0  # log-probability of an object that not even a candidate stands for
NEARLY = 1e-6  # how near to 1 a score, and to 0 and 1 a threshold, are told apart from them
NEVER = -1e4  # in the place of log 0, for a finite gradient
POOL = 256  # candidates of a class that are looked at


@dataclass(frozen=True)
class Objects:
    """K candidates of one class, surest first: log-scores [K] and boxes [K, 4], which have gradients; where each is.

    index: of each among all that the detector proposed.
    """

    log_scores: Tensor
    boxes: Tensor
    index: list[int]


Colours = Callable[[str, Sequence[int]], Tensor]  # a class and candidates -> log-probabilities [n, 10] of colours


def log_there(log_scores: Tensor, threshold: float, softness: float) -> Tensor:
    """The logit (log P - log(1 - P)) [K] of objects being there, from log-scores [K]."""
    sure = -torch.expm1(log_scores)
    logits = log_scores - sure.clamp(min=NEARLY).log()
    threshold = min(max(threshold, NEARLY), 1 - NEARLY)
    return (logits - math.log(threshold / (1 - threshold))) / (SCORE * softness)


def log_between(logits: Tensor, low: int, high: int | None) -> Tensor:
    """log P(low <= N < high) of the number N of independent objects that are there, from their logits [K].

    high None: no upper bound. Where K < low, candidates of log-probability ABSENT are added.
    """
    if len(logits) < low:
        logits = torch.cat([logits, logits.new_full((low - len(logits),), ABSENT)])
    there, absent = F.logsigmoid(logits), F.logsigmoid(-logits)
    top = low if high is None else high  # the last of the states 0 ... top holds all counts from top on
    states = torch.cat([logits.new_zeros(1), logits.new_full((top,), NEVER)])
    for yes, no in zip(there, absent, strict=True):
        stay = torch.cat([states[1:-1] + no, states[-1:]])
        states = torch.cat([states[:1] + no, torch.logaddexp(states[:-1] + yes, stay)])
    chosen = states[low:] if high is None else states[low:high]
    return chosen.logsumexp(0)


def log_beside(a: Tensor, b: Tensor, relation: str, threshold: float, side: float, softness: float) -> Tensor:
    """log P that box a [4] stands in the relation to box b [4], in pixels; side: the longer one of the picture.

    `verdict.relations` says "left of" where d_x < -1/2, with d = sign(o) max(|o| - slack, 0) / |o|, which is where

        beyond = (-o_x - slack_x - |o| / 2) / side

    is above 0. Unlike d it has a gradient where two boxes are too close. One pixel in the root keeps that finite.
    """
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    slack = threshold * ((a[2:] - a[:2]).abs() + (b[2:] - b[:2]).abs())
    axis = 0 if relation in ("left of", "right of") else 1
    along = offset[axis] if relation in ("right of", "below") else -offset[axis]
    far = (offset.square().sum() + 1e-6).sqrt()
    return F.logsigmoid((along - slack[axis] - far / 2) / side / (PLACE * softness))


def choose(log_scores: Tensor, boxes: Tensor, tag: str, thresholds: Thresholds) -> Objects:
    """The candidates of one class that are looked at, of log-scores [P] and boxes [P, 4].

    Of those above the threshold what `verdict.keep` leaves, and below it the surest that are apart from these and each
    other, up to `thresholds.objects` in all: they are not there yet, and may become so.
    """
    order = log_scores.detach().argsort(descending=True, stable=True)[:POOL]
    scores, corners = log_scores.detach()[order].exp().tolist(), boxes.detach()[order].tolist()
    kept: list[int] = []
    for rank, (score, box) in enumerate(zip(scores, corners, strict=True)):
        if len(kept) == thresholds.objects:
            break
        if rank >= thresholds.objects and score > thresholds.of(tag):
            continue
        if thresholds.overlap == 1.0 or all(iou(box, corners[other]) < thresholds.overlap for other in kept):
            kept.append(rank)
    chosen = order[kept]
    return Objects(log_scores[chosen], boxes[chosen], chosen.tolist())


def bounds(task: Task) -> dict[str, tuple[int, int | None]]:
    """Class -> (least number, first number that is too many or None). Raises ValueError where nothing fits."""
    found: dict[str, tuple[int, int | None]] = {}
    for noun in sorted(task.nouns):
        low = max((w.count for w in task.include if w.noun == noun), default=0)
        high = min((u.count for u in task.exclude if u.noun == noun), default=None)
        if high is not None and high <= low:
            raise ValueError(f"{task.prompt!r} asks for {low} × {noun} and for fewer than {high}; no picture has both")
        found[noun] = (low, high)
    return found


def log_fits(
    task: Task,
    found: Mapping[str, Objects],
    colours: Colours,
    names: Sequence[str],
    thresholds: Thresholds,
    side: float,
    softness: float,
) -> Tensor:
    """log P (a scalar, at most 0) that a picture shows what a task lists (module docstring).

    found: of each class of the task. colours is asked only where one is wanted, of the `count` surest; names: of its
    columns. side: the longer one of the picture, in pixels.
    """
    parts: list[Tensor] = []
    for noun, (low, high) in bounds(task).items():
        logits = log_there(found[noun].log_scores, thresholds.of(task.tag), softness)
        parts.append(log_between(logits, low, high))
    for wanted in task.include:
        some = found[wanted.noun]
        if wanted.colour is not None and some.index:
            seen = colours(wanted.noun, some.index[: wanted.count])
            parts.append(seen[:, list(names).index(wanted.colour)].sum())
        if wanted.position is not None:
            relation, target = wanted.position
            other = task.include[target]
            for one in some.boxes[: wanted.count]:
                for two in found[other.noun].boxes[: other.count]:
                    parts.append(log_beside(one, two, relation, thresholds.position, side, softness))
    return torch.stack(parts).sum()
