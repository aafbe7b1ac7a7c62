"""How good an image is beside the others of its prompt: against plain loops, and against the gradients themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from flowbp_ray.control.optimality import Compared, compare, strengths

NAN = math.nan


def deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def plain(
    scores: Sequence[Sequence[float]],
    weights: Sequence[float],
    images: int,
    kept: Sequence[bool],
    clip: float,
    std: str,
) -> list[float]:
    """r per row, NaN where nothing is learned, one row after the other."""
    rows = range(len(kept))
    groups = [list(rows)[i : i + images] for i in range(0, len(kept), images)]
    groups = [[row for row in group if kept[row]] for group in groups]
    used = [g for g in groups if len(g) > 1 and all(math.isfinite(term[row]) for term in scores for row in g)]
    result = [NAN] * len(kept)
    for group in used:
        if all(len({term[row] for row in group}) == 1 for term in scores):
            continue
        for row in group:
            total = 0.0
            for term, weight in zip(scores, weights, strict=True):
                mine = [term[i] for i in group]
                everyone = [term[i] for other in used for i in other]
                width = deviation(everyone if std == "batch" else mine)
                away = 0.0 if len(set(mine)) == 1 else (term[row] - sum(mine) / len(mine)) / width
                total += weight * (0.5 + 0.5 * max(-1.0, min(1.0, away / clip)))
            result[row] = total / sum(weights)
    return result


def drawn(terms: int, rows: int, seed: int) -> list[list[float]]:
    """Scores in few different values, so that ties happen, of terms whose units differ."""
    generator = np.random.default_rng(seed)
    return [(10.0**-m * generator.integers(0, 4, rows)).tolist() for m in range(terms)]


@pytest.mark.parametrize("std", ["batch", "prompt"])
@pytest.mark.parametrize("terms, weights", [(1, [1.0]), (2, [0.2, 3.0]), (3, [1.0, 0.5, 0.1])])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_plain_loop(terms: int, weights: list[float], std: str, seed: int) -> None:
    """With rows that are not kept and scores that are missing."""
    scores, generator = drawn(terms, 24, seed), np.random.default_rng(100 + seed)
    kept = (generator.random(24) > 0.25).tolist()
    scores[-1][int(generator.integers(24))] = NAN
    scores[0][int(generator.integers(24))] = math.inf
    for clip in (0.5, 1.0, 5.0):
        found = compare(scores, weights, 4, kept, clip, std)  # type: ignore[arg-type]
        assert found.rows.tolist() == pytest.approx(plain(scores, weights, 4, kept, clip, std), abs=1e-12, nan_ok=True)
        assert found.rows.shape == (24,) and found.terms.shape == (terms, 24)


def test_two_prompts_by_hand() -> None:
    """Scores 0, 1 | 2, 5: deviations 0.5 and 1.5 of the prompts, sqrt(3.5) of the batch."""
    batch = compare([[0.0, 1.0, 2.0, 5.0]], [1.0], 2, [True] * 4, 1.0, "batch")
    wide = math.sqrt(3.5)
    want = [0.5 - 0.25 / wide, 0.5 + 0.25 / wide, 0.5 - 0.75 / wide, 0.5 + 0.75 / wide]
    assert batch.rows.tolist() == pytest.approx(want)
    prompt = compare([[0.0, 1.0, 2.0, 5.0]], [1.0], 2, [True] * 4, 2.0, "prompt")
    assert prompt.rows.tolist() == pytest.approx([0.25, 0.75, 0.25, 0.75])
    assert (batch.alike, batch.unscored) == (0.0, 0.0)


def test_a_missing_score_leaves_out_its_prompt_and_is_no_zero() -> None:
    """Of any term; the other prompts are compared as if that prompt had not been drawn."""
    scores = [[0.0, 1.0, 2.0, 5.0, 4.0, 7.0], [3.0, 1.0, 1.0, NAN, 2.0, 2.5]]
    found = compare(scores, [1.0, 2.0], 2, [True] * 6, 5.0)
    without = [[s for i, s in enumerate(term) if i not in (2, 3)] for term in scores]
    alone = compare(without, [1.0, 2.0], 2, [True] * 4, 5.0)
    assert found.rows[[0, 1, 4, 5]].tolist() == alone.rows.tolist() and np.isnan(found.rows[[2, 3]]).all()
    assert found.unscored == pytest.approx(1 / 3) and found.alike == 0.0


def test_fewer_than_two_kept_images_cannot_be_compared() -> None:
    found = compare([[0.0, 1.0, 2.0, 0.0, 1.0, 5.0]], [1.0], 3, [False, True, False, True, True, False], 5.0, "prompt")
    assert np.isnan(found.rows[[0, 1, 2, 5]]).all() and found.rows[[3, 4]].tolist() == pytest.approx([0.4, 0.6])
    assert found.unscored == 0.5


def test_the_score_of_a_row_that_is_not_kept_does_not_matter() -> None:
    kept = [True, True, False, True, True, True]
    one = compare([[0.0, 1.0, NAN, 2.0, 4.0, 7.0]], [1.0], 3, kept, 5.0)
    two = compare([[0.0, 1.0, 900.0, 2.0, 4.0, 7.0]], [1.0], 3, kept, 5.0)
    assert np.array_equal(one.rows, two.rows, equal_nan=True) and one.unscored == 0.0


@pytest.mark.parametrize("std", ["batch", "prompt"])
def test_images_alike_teach_nothing(std: str) -> None:
    """A prompt of equal scores; equal scores by one term of two are ½ of it; and a batch of them."""
    found = compare([[0.1, 0.1, 0.1, 1.0, 0.0, 0.1]], [1.0], 3, [True] * 6, 5.0, std)  # type: ignore[arg-type]
    assert np.isnan(found.rows[:3]).all() and np.isfinite(found.rows[3:]).all() and found.alike == 0.5
    two = compare([[0.1] * 3, [0.0, 1.0, 0.5]], [3.0, 1.0], 3, [True] * 3, 5.0, std)  # type: ignore[arg-type]
    assert two.terms[0].tolist() == [0.5] * 3
    assert two.rows.tolist() == pytest.approx(0.75 * 0.5 + 0.25 * two.terms[1]) and two.alike == 0.0
    none = compare([[0.3] * 6], [1.0], 3, [True] * 6, 5.0, std)  # type: ignore[arg-type]
    assert np.isnan(none.rows).all() and none.alike == 1.0


@pytest.mark.parametrize("std", ["batch", "prompt"])
@pytest.mark.parametrize("factor, offset", [(1e6, 0.0), (1e-6, 0.0), (100.0, -40.0)])
def test_the_unit_of_a_score_does_not_matter(std: str, factor: float, offset: float) -> None:
    [scores] = drawn(1, 12, 5)
    other = [factor * score + offset for score in scores]
    one, two = (compare([s], [1.0], 3, [True] * 12, 2.0, std) for s in (scores, other))  # type: ignore[arg-type]
    assert two.rows.tolist() == pytest.approx(one.rows.tolist(), abs=1e-9, nan_ok=True)


def test_strengths_are_those_of_the_gradients() -> None:
    """Against dot products of the terms' whole gradients over the batch: weight · factor/B · (r − ½) · D, per row."""
    rows, size, factors = 6, 50, [1.5, 1.5, 0.0, 1.5, 0.0, 1.5]
    generator, weights = np.random.default_rng(0), [2.0, 0.3]
    kept, scores = [factor != 0 for factor in factors], generator.normal(size=(2, rows)).tolist()
    compared = compare(scores, weights, 3, kept, 2.0)
    by_optimality = generator.normal(size=(rows, size))
    signal = [float(d @ d) if flag else NAN for d, flag in zip(by_optimality, kept, strict=True)]
    found = strengths(compared, ["a", "b"], weights, factors, signal)
    gradients = []
    for term, weight in zip(compared.terms, weights, strict=True):
        parts = [
            weight * f / rows * (r - 0.5) * d if f else 0 * d
            for f, r, d in zip(factors, term, by_optimality, strict=True)
        ]
        gradients.append(np.concatenate(parts))
    a, b = gradients
    assert found["reward_grad_norm/a"] == pytest.approx(np.linalg.norm(a))
    assert found["reward_grad_norm/b"] == pytest.approx(np.linalg.norm(b))
    assert found["reward_grad_cosine/a,b"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_strengths_of_a_term_without_a_difference() -> None:
    compared = Compared(np.array([[0.5, 0.5], [0.2, 0.8]]), np.array([0.4, 0.6]), 0.0, 0.0)
    found = strengths(compared, ["a", "b"], [1.0, 1.0], [1.0, 1.0], [4.0, 4.0])
    assert found["reward_grad_norm/a"] == 0.0 and math.isnan(found["reward_grad_cosine/a,b"])
    assert found["reward_grad_norm/b"] == pytest.approx(math.sqrt(2) * 0.3 / 2 * 2)
