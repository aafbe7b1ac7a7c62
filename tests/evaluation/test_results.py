"""Results of an evaluation of its own: intervals, files, paired differences; parts that are written once and joined."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flowbp_ray.evaluation.results import Results, bootstrap, compare
from flowbp_ray.evaluation.standalone import Request, Standalone, scales
from flowbp_ray.messages import Evaluated, Item, Version
from flowbp_ray.prompts import PromptRecord, evaluation_prompts, read_prompts
from tests.small import small_overrides

SCORE = {"name": "score", "kind": "module:Class", "options": {"path": "a"}}
ALIKE: dict[str, Any] = {"prompts_digest": "a", "seed": 7, "num_steps": 6, "size": [64, 64], "model": "m"}
ALIKE |= {"rewards": {"terms": [SCORE], "monitors": []}}


def results(values: np.ndarray, **settings: Any) -> Results:
    """Of one metric [prompts, pictures] at guidance 1; prompts of two skills."""
    prompts = [(f"prompt {i}", "even" if i % 2 == 0 else "odd") for i in range(len(values))]
    shape = {"prompts": len(values), "pictures": values.shape[1]}
    return Results(ALIKE | shape | settings, prompts, {1.0: {"score": values}})


def test_the_bootstraps_interval_is_the_normal_one_where_that_is_known_to_hold() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = bootstrap(values)
    half = stats.norm.ppf(0.975) * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean()) and found.count == 2000
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert bootstrap(values) == found  # the same numbers again


def test_of_two_values_the_interval_are_these_two() -> None:
    """The mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    found = bootstrap(np.array([0.0, 1.0, np.nan]))
    assert (found.mean, found.low, found.high, found.count) == (0.5, 0.0, 1.0, 2)
    assert bootstrap(np.array([2.0])).low is None and bootstrap(np.array([np.nan])).mean is None


def test_pictures_of_a_prompt_are_one_observation() -> None:
    """Ten equal pictures of each prompt say no more than one."""
    one = np.random.default_rng(1).normal(size=(40, 1))
    ten = results(np.repeat(one, 10, axis=1)).summary()["guidance"]["1"]["score"]
    assert ten == pytest.approx(results(one).summary()["guidance"]["1"]["score"])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=(6, 3))
    values[4, 1] = np.nan
    made = results(values)
    (tmp_path / "settings.json").write_text(json.dumps(made.settings))
    made.write(tmp_path)
    found = Results.read(tmp_path)
    assert np.array_equal(found.values[1.0]["score"], values, equal_nan=True)
    assert list(found.prompts) == list(made.prompts) and found.settings == made.settings
    part = json.loads((tmp_path / "results.json").read_text())["guidance"]["1"]
    assert part["score"]["mean"] == pytest.approx(np.nanmean(values, axis=1).mean())
    assert part["score/odd"]["mean"] == pytest.approx(np.nanmean(values[1::2], axis=1).mean())
    with pytest.raises(ValueError, match=r"has no results\.parquet"):
        Results.read(tmp_path / "elsewhere")


def test_differences_are_paired_and_the_sign_test_leaves_ties_out() -> None:
    """Of eight prompts seven rise, by 1 each, and one is equal: p = 2 / 2^7."""
    base = np.random.default_rng(3).normal(size=(8, 1)) * 100
    raised = base + np.array([1.0] * 7 + [0.0])[:, None]
    [found] = compare(results(raised), results(base))[1.0].values()
    assert (found.above, found.below, found.p) == (7, 0, pytest.approx(2 / 2**7))
    assert found.estimate.mean == pytest.approx(7 / 8) and found.estimate.high == pytest.approx(1.0)
    same = compare(results(base), results(base))[1.0]["score"]
    assert (same.p, same.estimate.low, same.estimate.high) == (1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="differ in seed"):
        compare(results(base), results(base, seed=8))
    other = {"terms": [], "monitors": [SCORE | {"options": {"path": "b"}}]}
    with pytest.raises(ValueError, match="no guidance and metric in common"):  # another reward of that name
        compare(results(base), results(base, rewards=other))
    with pytest.raises(ValueError, match="no guidance"):
        compare(results(base), replace(results(base), values={3.0: {"score": base}}))


RECORDS = [PromptRecord(f"p{i}", {"skill": "s"}) for i in range(5)]
OF: Mapping[str, Any] = {"model": "m"}


def work(tmp_path: Path, *overrides: str, pictures: int = 2) -> Standalone:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{r.text}\n" for r in RECORDS))
    over = (*small_overrides(tmp_path), "evaluation.batch=3", "evaluation.pictures=2", *overrides)
    config = Request("shapes_flowbp_sparse", str(prompts), (1.0, 3.0), overrides=over).config()
    return Standalone(config, RECORDS, pictures, Version(0, 0), tmp_path / "out", OF)


def answer(item: Item) -> Evaluated:
    """A score that says which picture it is of."""
    scores = {"score": tuple(100 * item.guidance + sample for sample in item.samples)}
    images = np.array([np.full((4, 4, 3), sample, np.uint8) for sample in item.samples])
    return Evaluated(item.index, scores, (True,) * item.rows, images, 0.0)


def test_an_evaluation_goes_on_where_it_stopped_and_each_value_is_in_its_place(tmp_path: Path) -> None:
    first = work(tmp_path)
    for item in first.missing()[::2]:
        first.add(item, answer(item))
    second = work(tmp_path)
    left = second.missing()
    assert [item.index for item in left] == [item.index for item in first.items][1::2]
    assert second.needs.between(0, 1) == list(left[0].prompt_ids)
    assert second.needs.between(0) == list(dict.fromkeys(i for item in left for i in item.prompt_ids))
    for item in left:
        second.add(item, answer(item))
    assert not work(tmp_path).missing()
    found = second.finish()
    for guidance in (1.0, 3.0):
        expected = 100 * guidance + np.arange(10).reshape(2, 5).T
        assert np.array_equal(found.values[guidance]["score"], expected)
        assert second.sheet(guidance).is_file()


def test_a_folder_with_another_evaluation_is_refused(tmp_path: Path) -> None:
    work(tmp_path)
    with pytest.raises(ValueError, match=r"another evaluation.*\n  pictures was 2, is 3"):
        work(tmp_path, pictures=3)
    with pytest.raises(ValueError, match=r"seed was 7, is 8"):
        work(tmp_path, "evaluation.seed=8")
    with pytest.raises(ValueError, match=r'rewards.precision was "float32", is "bfloat16"'):
        work(tmp_path, "rewards.precision=bfloat16")
    work(tmp_path, "samplers.count=2", "evaluation.pictures=1")  # which decide no value


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "--prompts"),
        ({"prompts": "p.txt", "overrides": ["evaluation.guidance=[]"]}, "--guidance 1"),
        ({"prompts": "p.txt", "guidance": (0.5,)}, r"evaluation.guidance.0: .* greater than or equal to 1"),
        ({"prompts": "p.txt", "step": 3}, "--step is of a run"),
        ({"prompts": "p.txt", "weights": "raw"}, "shapes_flowbp_sparse is no folder of a run"),
        ({"target": "~nobody_here/run"}, "home of nobody"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    over = (*small_overrides(tmp_path), *asked.pop("overrides", ()))
    with pytest.raises(ValueError, match=said):
        Request(**{"target": "shapes_flowbp_sparse", "overrides": over} | asked).config()


def test_guidance_is_a_list_of_numbers() -> None:
    assert scales("1, 3.5") == (1.0, 3.5) and scales("") == ()
    for text in ("a,b", "1,", "1;3"):
        with pytest.raises(ValueError, match=r"--guidance must be numbers such as 1,3\.5, got"):
            scales(text)


@pytest.mark.parametrize("name", ["[2026] yes: #1.txt", "{a: 1}.txt", "'é ${HOME}.txt", "🙂.txt"])
def test_a_file_of_prompts_may_have_any_name(tmp_path: Path, name: str) -> None:
    """And the prompts of the training are not looked for: they may be on another machine."""
    over = (*small_overrides(tmp_path), "data.prompts=nowhere.txt")
    config = Request("shapes_flowbp_sparse", str(tmp_path / name), overrides=over).config()
    assert config.evaluation.prompts == config.data.prompts == str(tmp_path / name)


def test_what_is_held_out_of_training_can_be_evaluated_and_another_file_is_read_by_its_own_columns(
    tmp_path: Path,
) -> None:
    train, other = tmp_path / "train.csv", tmp_path / "other.csv"
    train.write_text("caption\n" + "".join(f"a {i}\n" for i in range(40)))
    other.write_text("text\na cat\n")
    stored = tmp_path / "mine.yaml"
    stored.write_text(
        f"extends: shapes_refl.yaml\ndata: {{prompts: {train}, columns: {{prompt: caption}}, weights: null, "
        "heldout: {fraction: 0.5}}\nevaluation: {prompts: data:heldout, limit: 3, where: null}\n"
    )
    held_out = Request(str(stored), "data:heldout").config()
    assert len(evaluation_prompts(held_out)) > 3 and held_out.data.prompts == str(train)
    assert set(evaluation_prompts(held_out)).isdisjoint(read_prompts(held_out)[0])
    asked = Request(str(stored), str(other), overrides=("evaluation.columns={prompt: text}",)).config()
    train.unlink()  # which is not needed for another file
    assert [[r.text for r in records] for records in read_prompts(asked)] == [["a cat"], ["a cat"]]
