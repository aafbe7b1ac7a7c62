"""Evaluations by tag: GenEval's file as prompts, a breakdown of every metric, and the published overall value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from flowbp_ray import prompts
from flowbp_ray.artifacts.report import compare
from flowbp_ray.evaluation.estimates import Estimate, Evaluation, estimate, mean_of_means, measure, paired_difference
from flowbp_ray.prompts import PromptRecord

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
]


@pytest.fixture
def records(tmp_path: Path) -> list[PromptRecord]:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return prompts.load(str(path))


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((count, 8, 8, 3), np.uint8), np.ones(count, bool)


def test_genevals_file_is_read_as_it_is(records: list[PromptRecord]) -> None:
    assert [r.text for r in records] == [line["prompt"] for line in LINES]
    assert [r.skill for r in records] == ["single_object"] * 3 + ["counting"]
    assert records[3].extra["include"] == LINES[3]["include"]
    assert PromptRecord("x", {"skill": "s", "tag": "t"}).skill == "s" and PromptRecord("x").skill == ""


def test_verdicts_are_broken_down_by_tag_and_averaged_over_tags(records: list[PromptRecord]) -> None:
    """Three of one tag with 1, 0, 1, one of the other with 0: the mean is 2/4, the mean of means (2/3 + 0)/2."""
    images, drawn = pictures(4)
    scores = {"geneval": [1.0, 0.0, 1.0, 0.0], "other": [0.1, 0.2, 0.3, 0.8]}
    evaluation = measure(images, records, scores, drawn)
    means = evaluation.means()
    assert means["geneval"] == 0.5
    assert means["geneval/single_object"] == pytest.approx(2 / 3) and means["geneval/counting"] == 0.0
    assert means["geneval/overall"] == pytest.approx(1 / 3)
    assert means["other"] == pytest.approx(0.35) and "other/overall" not in means
    assert evaluation.as_dict()["geneval/single_object"]["count"] == 3


def test_without_tags_there_is_no_breakdown() -> None:
    images, drawn = pictures(2)
    evaluation = measure(images, [PromptRecord("a"), PromptRecord("b")], {"r": [0.5, 0.7]}, drawn)
    assert list(evaluation.estimates()) == ["r"]


def test_the_overall_interval_is_the_stratified_one_where_parts_are_normal() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(m, s, n) for m, s, n in ((0, 1, 40), (2, 3, 25), (5, 0.5, 60))]
    whole = mean_of_means([estimate(p) for p in parts])
    error = 1.959964 * np.sqrt(sum(p.var(ddof=1) / len(p) for p in parts)) / 3
    assert whole.mean == pytest.approx(np.mean([p.mean() for p in parts]))
    assert whole.low is not None and whole.high is not None
    assert whole.mean - whole.low == pytest.approx(error, rel=1e-6) and whole.high - whole.mean == pytest.approx(error)
    assert whole.count == 125


def test_the_overall_interval_of_shares_covers_what_it_should() -> None:
    """Drawn 2,000 times from known shares, one of them near 1, it holds their mean in 95 % (± 1.5) of the draws."""
    shares, size, rng = [0.98, 0.5, 0.15], 80, np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        whole = mean_of_means([estimate((rng.random(size) < share).astype(float)) for share in shares])
        assert whole.low is not None and whole.high is not None
        hits += whole.low <= np.mean(shares) <= whole.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_part_without_an_answer_leaves_no_overall() -> None:
    assert mean_of_means([estimate(np.array([1.0, 0.0])), estimate(np.array([np.nan]))]) == Estimate(
        None, None, None, 2
    )
    single = mean_of_means([estimate(np.array([0.4])), estimate(np.array([0.2, 0.4]))])
    assert single.mean == pytest.approx(0.35) and single.low is None


@pytest.mark.parametrize("accepted", [0, 7, 60])
def test_rates_have_wilsons_interval(accepted: int) -> None:
    """(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), written out; and p within z standard errors of both ends."""
    got = estimate(np.array([1.0] * accepted + [0.0] * (60 - accepted)))
    p, n, z = accepted / 60, 60, stats.norm.ppf(0.975)
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert got.mean == p and got.low is not None and got.high is not None
    assert (got.low, got.high) == pytest.approx(np.array([centre - half, centre + half]) / (1 + z**2 / n), abs=1e-12)
    for end in (got.low, got.high):
        assert abs(p - end) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, abs=1e-9)


def test_means_and_paired_changes_have_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=50), rng.normal(0.3, 1, size=50)
    low, high = stats.norm.interval(0.95, loc=(after - before).mean(), scale=stats.sem(after - before))
    got = paired_difference(before, after)
    assert (got.low, got.high) == pytest.approx((low, high))
    low, high = stats.norm.interval(0.95, loc=before.mean(), scale=stats.sem(before))
    assert (estimate(before).low, estimate(before).high) == pytest.approx((low, high))


def test_changes_by_skill_are_those_of_the_skills_prompts() -> None:
    """Against scipy's normal interval of each part, and the stratified one of their mean."""
    rng, skills = np.random.default_rng(1), ("a", "b") * 30
    ends = [
        Evaluation({"verdict": rng.integers(0, 2, 60).astype(float), "score": rng.normal(size=60)}, {}, skills)
        for _ in range(2)
    ]
    got = ends[0].changes(ends[1])
    assert list(got) == ["verdict", "verdict/a", "verdict/b", "verdict/overall", "score"]
    halves = []
    for offset, skill in enumerate("ab"):
        delta = (ends[1].values["verdict"] - ends[0].values["verdict"])[offset::2]
        interval = stats.norm.interval(0.95, loc=delta.mean(), scale=stats.sem(delta))
        assert (got[f"verdict/{skill}"].low, got[f"verdict/{skill}"].high) == pytest.approx(interval)
        halves.append((interval[1] - interval[0]) / 2)
    whole = got["verdict/overall"]
    assert whole.low is not None and whole.high is not None and whole.mean == pytest.approx(got["verdict"].mean)
    assert (whole.high - whole.low) / 2 == pytest.approx(np.hypot(*halves) / 2)


def test_a_change_that_is_nowhere_finite_is_left_out() -> None:
    before = Evaluation({"judge": np.array([np.nan, 1.0]), "score": np.array([0.2, 0.3])}, {}, ())
    after = Evaluation({"judge": np.array([1.0, np.nan]), "score": np.array([0.4, 0.6])}, {}, ())
    got = before.changes(after)
    assert list(got) == ["score"] and got["score"].mean == pytest.approx(0.25)


def test_the_verifier_under_another_name_has_no_row_of_its_own() -> None:
    accepted, other = np.array([0.0, 1.0, np.nan, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    before = Evaluation({"shapes_verifier": accepted, "verifier": accepted.copy(), "geneval": other}, {}, ())
    changed = replace(before, values=before.values | {"shapes_verifier": other, "verifier": other.copy()})
    assert [before.repeats(n) for n in before.values] == [True, False, False]
    assert list(compare(before, changed)["change"]) == ["verifier", "geneval"]  # equal to it after, but not before
