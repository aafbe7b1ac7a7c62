"""GenEval as a metric: real models behind it, one picture at a time, and what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowbp_ray.rewards import base
from flowbp_ray.rewards.geneval import Detection
from flowbp_ray.rewards.geneval.detect import Mask2Former
from flowbp_ray.rewards.geneval.metric import GenEval
from tests.rewards.geneval.test_detectors import picture

SIZE = (48, 80)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def seen_by(detector: Mask2Former, image: Tensor, above: float) -> dict[str, int]:
    """How many of each class the detector sees."""
    nouns = [d.noun for d in detector.find(image, above)]
    return {noun: nouns.count(noun) for noun in nouns}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.stack([picture(*SIZE, seed=seed) for seed in range(3)])


@pytest.fixture(scope="module")
def rows(mask2former: Path, images: Tensor) -> list[dict[str, Any]]:
    """Of each picture a prompt that says what is seen on it, and one that says there is one more of it."""
    detector, rows = Mask2Former(mask2former), []
    for i, image in enumerate(images):
        seen = seen_by(detector, image, 0.3)
        noun = max(seen, key=lambda n: seen[n])
        for more in (0, 1):
            count = seen[noun] + more
            rows.append(
                {
                    "tag": "single_object",
                    "include": [{"class": noun, "count": count}],
                    "exclude": [{"class": noun, "count": count + 1}],
                    "prompt": f"picture {i} has {count} of them",
                }
            )
    return rows


@pytest.fixture(scope="module")
def options(
    mask2former: Path, clip: Path, rows: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    path = write(tmp_path_factory.mktemp("prompts") / "evaluation_metadata.jsonl", rows)
    return {"detector": str(mask2former), "clip": str(clip), "prompts": str(path)}


def test_what_is_seen_is_right_and_one_more_is_wrong(options: dict, rows: list[dict], images: Tensor) -> None:
    metric = base.build("geneval", **options)
    prompts = [row["prompt"] for row in rows]
    scores = metric.score(images.repeat_interleave(2, dim=0), prompts)
    assert scores.tolist() == [1.0, 0.0] * 3
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_a_row_depends_on_nothing_else(options: dict, rows: list[dict], images: Tensor) -> None:
    metric = GenEval(**options)
    prompts = [row["prompt"] for row in rows[::2]]
    whole = metric.verdicts(images, prompts)
    alone = [metric.verdicts(images[i : i + 1], prompts[i : i + 1])[0] for i in range(3)]
    assert whole == alone
    assert metric.verdicts(images.flip(0), prompts[::-1]) == whole[::-1]


def test_counting_asks_for_surer_detections(options: dict, mask2former: Path, images: Tensor, tmp_path: Path) -> None:
    """The same clause under another tag: the detector's own count above 0.3 and above 0.9 decides."""
    detector = Mask2Former(mask2former)
    low, high = seen_by(detector, images[0], 0.3), seen_by(detector, images[0], 0.9)
    noun = next(n for n in low if low[n] > high.get(n, 0))
    include = [{"class": noun, "count": low[noun]}]
    rows = [{"tag": tag, "include": include, "prompt": tag} for tag in ("two_object", "counting")]
    metric = GenEval(**{**options, "prompts": str(write(tmp_path / "two.jsonl", rows))})
    assert metric.score(images[:1].repeat(2, 1, 1, 1), ["two_object", "counting"]).tolist() == [1.0, 0.0]
    looser = GenEval(**{**options, "prompts": str(tmp_path / "two.jsonl"), "counting_threshold": 0.3})
    assert looser.score(images[:1], ["counting"]).tolist() == [1.0]


def test_colours_are_asked_of_clip(options: dict, images: Tensor, rows: list[dict], tmp_path: Path) -> None:
    metric = GenEval(**options)
    noun = rows[0]["include"][0]["class"]
    surest = max((d for d in metric.detector.find(images[0], 0.3) if d.noun == noun), key=lambda d: d.score)
    (colour,) = metric.colours.name(images[0], noun, [surest])
    wrong = "white" if colour != "white" else "black"
    tasks = [
        {"tag": "colors", "include": [{"class": noun, "count": 1, "color": c}], "prompt": c} for c in (colour, wrong)
    ]
    metric = GenEval(**{**options, "prompts": str(write(tmp_path / "colours.jsonl", tasks))})
    first, second = metric.verdicts(images[:1].repeat(2, 1, 1, 1), [colour, wrong])
    assert first.correct and second.reasons == (f"{noun} is {colour} where {wrong} is asked for",)


def test_an_owl_finds_what_only_the_prompts_name(options: dict, owlv2: Path, images: Tensor, tmp_path: Path) -> None:
    """Overlapping boxes of one class are thinned unless it is told otherwise."""
    tasks = [{"tag": "single_object", "include": [{"class": "unicorn", "count": 1}], "prompt": "a unicorn"}]
    own = {**options, "detector": str(owlv2), "prompts": str(write(tmp_path / "owl.jsonl", tasks))}
    metric = GenEval(**own)
    assert metric.thresholds.overlap == 0.5 and "unicorn" in metric.detector.nouns
    there = any(d.noun == "unicorn" for d in metric.detector.find(images[0], 0.3))
    assert metric.score(images[:1], ["a unicorn"]).tolist() == [float(there)]
    assert GenEval(**own, max_overlap=1.0).thresholds.overlap == 1.0
    assert GenEval(**options).thresholds.overlap == 1.0


def test_what_is_judged_is_the_picture_as_saved(options: dict, rows: list[dict], images: Tensor) -> None:
    metric, seen = GenEval(**options), []

    class Watched:
        nouns = metric.detector.nouns

        def find(self, image: Tensor, above: float) -> list[Detection]:
            seen.append(image)
            return []

    metric.detector = Watched()
    metric.score(images[:1] + 0.4 / 255, [rows[0]["prompt"]])
    assert torch.equal(seen[0], images[0])


def test_no_picture_is_no_zero(options: dict, rows: list[dict], images: Tensor) -> None:
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    scores = GenEval(**options).score(broken, [row["prompt"] for row in rows[::2]])
    assert scores[0] == 1 and scores[1].isnan() and scores[2] == 1


def test_a_prompt_that_is_not_in_the_file_raises(options: dict, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the prompt 'a photo of a bench' is not in options\.prompts, so"):
        GenEval(**options).score(images[:1], ["a photo of a bench"])
    with pytest.raises(ValueError, match="2 images need 2 prompts"):
        GenEval(**options).score(images[:2], ["a photo of a bench"])


def test_evaluation_prompts_are_checked_before_anything_starts(options: dict, rows: list[dict]) -> None:
    base.check_prompts("geneval", options, [row["prompt"] for row in rows])
    with pytest.raises(ValueError, match=r"'a cat' is not in options\.prompts, nor are 1 others"):
        base.check_prompts("geneval", options, [rows[0]["prompt"], "a cat", "a dog"])
    base.check_prompts("shapes_clip", {}, ["anything"])


def test_it_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match=r"'geneval' .*cannot be backpropagated; write gradient: none"):
        base.check_trainable("geneval")
    base.check_trainable("shapes_clip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": None}, r"needs options\.detector: the folder of a detector"),
        (
            {"clip": "/nowhere"},
            r"options\.clip is '/nowhere', which does not exist; write the path of the folder of a CLIP",
        ),
        ({"prompts": None}, r"needs options\.prompts: GenEval's prompt file"),
        ({"threshold": 2}, "threshold score must lie in 0..1"),
        ({"max_overlap": -1.0}, "threshold overlap must lie in 0..1"),
        ({"folder": "x"}, "unexpected keyword argument 'folder'"),
    ],
)
def test_options_are_checked_without_building(options: dict, change: dict, message: str) -> None:
    base.check("geneval", options)
    with pytest.raises(ValueError, match=message):
        base.check("geneval", {**options, **change})


def test_classes_are_checked_without_building(options: dict, tmp_path: Path) -> None:
    tasks = [{"tag": "single_object", "include": [{"class": "zebra", "count": 1}], "prompt": "a zebra"}]
    with pytest.raises(ValueError, match="has no class for 'zebra'"):
        base.check("geneval", {**options, "prompts": str(write(tmp_path / "zebra.jsonl", tasks))})
