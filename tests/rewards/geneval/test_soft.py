"""GenEval's rules as probabilities: against counting by hand, and, where nothing is in doubt, against the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from flowbp_ray.rewards.geneval import Detection, Task, Thresholds, keep, relations, verdict
from flowbp_ray.rewards.geneval.detect import box_of
from flowbp_ray.rewards.geneval.prompts import RELATIONS, Unwanted, Wanted
from flowbp_ray.rewards.geneval.soft import bounds, choose, log_beside, log_between, log_fits, log_there
from flowbp_ray.rewards.geneval.soft_detect import expected_ends

SHARP = 1e-3
NOUNS, COLOURS = ("dog", "cat", "car"), ("red", "green", "blue")


@pytest.mark.parametrize(("low", "high"), [(1, None), (3, None), (2, 3), (0, 2), (0, 6), (5, None)])
def test_a_count_is_the_sum_over_all_subsets(low: int, high: int | None) -> None:
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    chance = 0.0
    for there in product((0, 1), repeat=5):
        if low <= sum(there) and (high is None or sum(there) < high):
            chance += math.prod(p if t else 1 - p for p, t in zip(logits.sigmoid().tolist(), there, strict=True))
    assert log_between(logits, low, high).exp().item() == pytest.approx(chance, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: log_between(x, low, high), logits)


def test_too_few_candidates_are_improbable_with_a_gradient() -> None:
    logits = torch.tensor([-400.0, 3.0], requires_grad=True)
    value = log_between(logits, 3, 4)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(-400 - 20 - math.log1p(math.exp(-3)), rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 1 / (1 + math.exp(3))]))
    assert log_between(torch.zeros(0), 0, 1).item() == 0.0


def test_the_odds_of_a_score_are_those_over_the_threshold() -> None:
    scores = torch.tensor([0.3, 0.6, 1e-30, 1.0])
    logits = log_there(scores.log(), 0.3, 4.0)  # SCORE * 4 is a temperature of 1
    odds = scores.double() / (1 - scores.double()).clamp(min=1e-6) * (0.7 / 0.3)
    torch.testing.assert_close(logits.double(), odds.log(), rtol=1e-4, atol=1e-5)


def boxes(rng: np.random.Generator, count: int) -> Tensor:
    corner, size = rng.uniform(0, 60, (count, 2)), rng.uniform(2, 40, (count, 2))
    return torch.from_numpy(np.concatenate([corner, corner + size], 1))


def test_beside_is_the_verdict_s_relation() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for a, b in zip(boxes(rng, 400), boxes(rng, 400), strict=True):
        true = relations(tuple(a.tolist()), tuple(b.tolist()))
        for relation in RELATIONS:
            chance = log_beside(a, b, relation, 0.1, 100.0, 1.0).exp().item()
            assert (chance > 0.5) == (relation in true)
        held += len(true)
    assert held > 200


def test_beside_has_a_gradient_where_boxes_are_one() -> None:
    box = torch.tensor([3.0, 4.0, 20.0, 30.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_beside(box, box.detach(), "left of", 0.1, 64.0, 1.0), box)
    assert torch.isfinite(gradient).all() and gradient[0] < 0
    far = torch.tensor([30.0, 9.0, 41.0, 20.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: log_beside(x, far, "above", 0.1, 64.0, 1.0), box)


def test_ends_are_those_of_all_masks_weighed() -> None:
    logits = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    first = after = 0.0
    for there in product((0, 1), repeat=5):
        weight = math.prod(p if t else 1 - p for p, t in zip(logits[0].sigmoid().tolist(), there, strict=True))
        inside = [i for i, t in enumerate(there) if t]
        first += weight * (inside[0] if inside else 5)
        after += weight * (inside[-1] + 1 if inside else 0)
    found = expected_ends(logits)
    assert [end.item() for end in found] == pytest.approx([first, after], rel=1e-12)
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[2:5, 3:8] = True
    sharp = torch.where(mask, 50.0, -50.0)
    (left, right), (top, bottom) = expected_ends(sharp.amax(0)[None]), expected_ends(sharp.amax(1)[None])
    assert (left.item(), top.item(), right.item(), bottom.item()) == box_of(mask)


def random_task(rng: np.random.Generator) -> Task:
    include: list[Wanted] = []
    for index, noun in enumerate(rng.permutation(NOUNS)[: rng.integers(1, 3)]):
        colour = str(rng.choice(COLOURS)) if rng.random() < 0.4 else None
        place = (str(rng.choice(RELATIONS)), 0) if index and rng.random() < 0.6 else None
        include.append(Wanted(str(noun), int(rng.integers(1, 3)), colour, place))
    exclude = (Unwanted(include[0].noun, include[0].count + 1),) if rng.random() < 0.4 else ()
    return Task("p", str(rng.choice(["counting", "position"])), tuple(include), exclude)


@pytest.mark.parametrize("overlap", [1.0, 0.5])
def test_without_doubt_it_is_the_verdict(overlap: float) -> None:
    """600 random pictures and tasks, of which a good part is right."""
    rng, thresholds = np.random.default_rng(4), Thresholds(objects=4, overlap=overlap)
    right = 0
    for _ in range(600):
        task, count = random_task(rng), int(rng.integers(1, 10))
        where, scores = boxes(rng, count), rng.choice([0.1, 0.6, 0.97], count) + rng.uniform(-0.02, 0.02, count)
        kinds, hues = rng.integers(3, size=count), rng.choice(3, count, p=[0.8, 0.1, 0.1])
        one = [Detection(NOUNS[k], float(s), tuple(b.tolist())) for k, s, b in zip(kinds, scores, where, strict=True)]
        named = {(d.noun, d.box): COLOURS[h] for d, h in zip(one, hues, strict=True)}
        expected = verdict(
            task, keep(one, task.tag, thresholds), lambda n, some, m=named: [m[n, d.box] for d in some], thresholds
        )
        log_scores = torch.full((count, 3), -60.0, dtype=torch.float64)
        log_scores[torch.arange(count), torch.from_numpy(kinds)] = torch.from_numpy(scores).log()
        found = {n: choose(log_scores[:, NOUNS.index(n)], where, task.tag, thresholds) for n in task.nouns}

        def colours(noun: str, chosen: Sequence[int], hues: np.ndarray = hues) -> Tensor:
            return torch.where(torch.eye(3, dtype=torch.bool)[hues[list(chosen)]], 0.0, -50.0).double()

        chance = log_fits(task, found, colours, COLOURS, thresholds, 100.0, SHARP).exp().item()
        assert chance == pytest.approx(float(expected.correct), abs=1e-2)
        right += expected.correct
    assert right > 60


def test_below_the_threshold_there_are_candidates_for_a_gradient() -> None:
    scores = torch.tensor([0.9, 0.8, 0.2, 0.1], dtype=torch.float64)
    where = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [0, 1, 10, 11], [30, 30, 40, 40]], dtype=torch.float64)
    apart = choose(scores.log(), where, "position", Thresholds(overlap=0.5, objects=2))
    assert apart.index == [0, 3]
    assert choose(scores.log(), where, "position", Thresholds(objects=2)).index == [0, 1]


def test_what_no_picture_has_is_refused() -> None:
    assert bounds(Task("p", "counting", (Wanted("dog", 2),), (Unwanted("dog", 3),))) == {"dog": (2, 3)}
    with pytest.raises(ValueError, match="asks for 2 × dog and for fewer than 2; no picture has both"):
        bounds(Task("p", "counting", (Wanted("dog", 2),), (Unwanted("dog", 2),)))
