"""Draws have the stated distributions (chi-square at p > 1e-4, fixed keys) and depend on nothing but their key."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.rollout.items import plans_of_step
from flowbp_ray.surrogate import (
    METHODS,
    DirichletPair,
    Draw,
    LateBiased,
    Method,
    MidpointJPair,
    MidpointPair,
    UniformPair,
)
from flowbp_ray.utils.random import normal, stream

DRAWS = 4000


def draws(method: Method, steps: int, seed: int = 0) -> list[Draw]:
    return [method.draw(steps, stream(seed, "plan", step)) for step in range(DRAWS)]


def assert_distributed(found: Iterable[Hashable], expected: dict[Hashable, float]) -> None:
    counts = Counter(found)
    assert set(counts) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1.0)
    total = sum(counts.values())
    assert min(expected.values()) * total > 5, "too few draws for a chi-square test"
    p = stats.chisquare([counts[key] for key in expected], [total * q for q in expected.values()]).pvalue
    assert p > 1e-4


def without_replacement(weights: list[float], k: int) -> dict[Hashable, float]:
    """Probability of every set, by summing over all orders of drawing it."""
    found: dict[Hashable, float] = {}
    for chosen in combinations(range(len(weights)), k):
        total = 0.0
        for order in permutations(chosen):
            left, probability = sum(weights), 1.0
            for i in order:
                probability *= weights[i] / left
                left -= weights[i]
            total += probability
        found[chosen] = total
    return found


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.0])
def test_sparse_draws_without_replacement(bias: float) -> None:
    expected = without_replacement([(i + 1) ** bias for i in range(5)], 3)
    found = [draw.nodes for draw in draws(METHODS["flowbp_sparse"](3, bias), 5)]
    assert_distributed(found, expected)


def test_sparse_marginals_follow_the_late_bias() -> None:
    """k = 1: the marginal itself is (i+1)^bias; in a tail window i still counts from node 0."""
    weights = np.arange(1, 9) ** 2.0
    found = [draw.nodes[0] for draw in draws(METHODS["flowbp_sparse"](1, 2.0), 8, 1)]
    assert_distributed(found, dict(enumerate((weights / weights.sum()).tolist())))
    tail = replace(METHODS["flowbp_sparse"](1, 2.0), tail_ratio=0.5)
    found = [draw.nodes[0] for draw in draws(tail, 8, 2)]
    assert_distributed(found, {i: float(weights[i] / weights[4:].sum()) for i in range(4, 8)})


def test_refl_is_uniform_over_the_last_nodes() -> None:
    found = draws(METHODS["refl"](5), 8)
    assert_distributed([draw.end for draw in found], dict.fromkeys(range(3, 8), 0.2))
    assert all(draw.nodes == (draw.end,) for draw in found)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("per", ["per_batch", "per_sample"])
@pytest.mark.parametrize("method", [METHODS["refl"](5), METHODS["drtune"](3, 0.4)], ids=["refl", "drtune"])
def test_the_mean_number_of_steps_is_that_of_the_draws(method: Method, per: Any, rows: int) -> None:
    """The longest rollout of the rows decides; 4 standard errors."""
    method = replace(method, draws=per)
    stops = [max(p.stop for p in plans_of_step(method, static_shift(12, 3.0), 0, i, rows)) for i in range(1000)]
    assert abs(np.mean(stops) - method.mean_stop(12, rows)) < 4 * np.std(stops) / len(stops) ** 0.5


def test_drtune_strides_up_to_its_early_stop() -> None:
    expected: dict[Hashable, float] = {}
    for r in range(1, 6):
        e = 12 - r
        stride = max(1, (e + 1) // 3)
        starts = range(e - 2 * stride + 1)
        for start in starts:
            expected[e, tuple(start + i * stride for i in range(3))] = 1 / 5 / len(starts)
    found = draws(METHODS["drtune"](3, 0.4), 12)
    assert_distributed([(draw.end, draw.nodes) for draw in found], expected)


def leap(pair: object, tail: float = 1.0) -> Method:
    return replace(METHODS["leapalign"](), segments=pair, tail_ratio=tail)  # type: ignore[arg-type]


def test_uniform_pairs() -> None:
    expected: dict[Hashable, float] = dict.fromkeys(combinations(range(7), 2), 1 / 21)
    assert_distributed([(d.k, d.j) for d in draws(leap(UniformPair()), 7)], expected)
    expected = dict.fromkeys(combinations(range(5, 10), 2), 1 / 10)
    assert_distributed([(d.k, d.j) for d in draws(leap(UniformPair(), 0.5), 10)], expected)


def test_uniform_pairs_with_a_late_junction() -> None:
    expected: dict[Hashable, float] = {}
    for j_rev in range(1, 4):
        for k_rev in range(j_rev + 1, 9):
            expected[8 - k_rev, 8 - j_rev] = 1 / 3 / (8 - j_rev)
    assert_distributed([(d.k, d.j) for d in draws(leap(UniformPair(3)), 8)], expected)


def test_midpoint_pairs() -> None:
    found = draws(leap(MidpointPair()), 9)
    assert_distributed([(d.k, d.j) for d in found], {(k, (k + 9) // 2): 1 / 8 for k in range(8)})
    found = draws(leap(MidpointJPair(), 0.6), 10)
    assert_distributed([(d.k, d.j) for d in found], {((4 + j) // 2, j): 1 / 5 for j in range(5, 10)})


def test_dirichlet_lengths_by_hand() -> None:
    pair = DirichletPair()
    assert pair.lengths([0.2, 0.5, 0.3], 10) == (2, 5, 3)
    assert pair.lengths([0.26, 0.48, 0.26], 10) == (3, 4, 3)  # 3 + 5 + 3: one too many, off the largest share
    assert pair.lengths([0.34, 0.34, 0.32], 10) == (4, 3, 3)  # 3 + 3 + 3: the remainder to the largest share
    assert pair.lengths([0.01, 0.98, 0.01], 10) == (1, 8, 1)
    assert DirichletPair(max_j_rev=3).lengths([0.6, 0.2, 0.2], 10) == (2, 2, 6)


def test_dirichlet_pairs_stay_in_their_bounds() -> None:
    found = draws(leap(DirichletPair(), 0.7), 25)
    assert min(d.k for d in found) == 25 - 18 and max(d.j for d in found) == 23  # type: ignore[type-var]
    assert all(7 <= d.k < d.j < 24 for d in found)  # type: ignore[operator]
    shares = np.array([[25 - 1 - d.j, d.j - d.k] for d in found]) / 18  # type: ignore[operator]
    assert shares.mean(axis=0) == pytest.approx([2.5 / 10.5, 6 / 10.5], abs=0.01)
    limited = draws(leap(DirichletPair(max_j_rev=4)), 25)
    assert min(d.j for d in limited) == 25 - 4  # type: ignore[type-var]


def test_bridge_splits_its_budget_at_j() -> None:
    """k nodes in proportion to length, j always active, each part biased from its own start."""
    method = METHODS["flowbp_bridge"](4, 2.0)
    found = draws(method, 8)
    for draw in found:
        assert draw.j in draw.nodes and len(set(draw.nodes)) == 4
        before = sum(node < draw.j for node in draw.nodes)  # type: ignore[operator]
        assert before == min(max(1, round(4 * draw.j / 8)), 3)  # type: ignore[operator]
    at_4 = [draw.nodes for draw in found if draw.j == 4]
    first = without_replacement([1, 4, 9, 16], 2)
    assert_distributed([nodes[:2] for nodes in at_4], first)
    assert_distributed([nodes[3] for nodes in at_4], {5: 1 / 14, 6: 4 / 14, 7: 9 / 14})
    tail = draws(METHODS["flowbp_bridge"](3, 2.0, tail=0.6), 10)
    at_8 = [tuple(node - 4 for node in draw.nodes[:2]) for draw in tail if draw.j == 8]
    assert_distributed(at_8, first)


def test_a_short_grid_has_all_its_nodes_active() -> None:
    method = METHODS["drtune"](4, 0.8)
    short = [d for d in draws(method, 12) if d.end is not None and d.end < 3]
    assert short and all(d.nodes == tuple(range(d.end + 1)) for d in short)  # type: ignore[operator]
    bridge = Method(active=LateBiased(6, 1.0), segments=UniformPair())
    assert all(len(d.nodes) == min(6, 8 - d.k) for d in draws(bridge, 8)[:500])  # type: ignore[operator]


# What these keys draw, written down: another machine, process or release must draw the same.
RECORDED = {
    "refl": Draw(end=23, nodes=(23,)),
    "draft_lv": Draw(nodes=(24,)),
    "drtune": Draw(end=23, nodes=(0, 8, 16)),
    "leapalign": Draw(k=21, j=24),
    "flowbp_sparse": Draw(nodes=(15, 16, 20, 21)),
    "flowbp_bridge": Draw(k=21, j=24, nodes=(15, 19, 20, 23, 24)),
    "flowbp_lagrange": Draw(k=2, j=18),
}


@pytest.mark.parametrize("name", METHODS)
def test_draws_are_recorded(name: str) -> None:
    assert METHODS[name]().draw(25, stream(114, "plan", 7)) == RECORDED[name]


def test_draws_depend_on_nothing_but_their_key() -> None:
    method, sigmas = METHODS["flowbp_bridge"](), static_shift(25)
    keys = [(seed, step, index) for seed in (42, 2**40) for step in range(5) for index in (None, 0, 1)]
    once = {key: method.plan(sigmas, stream(key[0], "plan", key[1], key[2])) for key in keys}
    random.Random(0).shuffle(keys)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(method.plan(sigmas, stream(key[0], "plan", key[1], key[2])) == once[key] for key in keys)
    assert len(set(once.values())) == len(keys)


def test_noise_of_a_sample_is_its_own() -> None:
    whole = normal((2, 3), 42, "noise", 5, range(6))
    assert whole.shape == (6, 2, 3) and whole.dtype == torch.float32
    assert torch.equal(normal((2, 3), 42, "noise", 5, [4, 1]), whole[[4, 1]])
    others = [normal((2, 3), *key, [0]) for key in ((43, "noise", 5), (42, "renoise", 5), (42, "noise", 6))]
    assert all(not torch.equal(other, whole[:1]) for other in others)
    large = normal((20_000,), 0, "noise", 0, [0]).numpy()[0]
    assert stats.kstest(large, "norm").pvalue > 1e-4


def test_streams_refuse_bad_keys() -> None:
    with pytest.raises(ValueError, match=r"purpose must be one of prompt, .*, times, forward, got plans"):
        stream(0, "plans", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative, got -1, 0, None"):
        stream(-1, "plan", 0)
