"""GenEval as a reward: its gradient through the metric's real classes, its limit, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowbp_ray.config import loading
from flowbp_ray.config.rewards import TermConfig
from flowbp_ray.preflight import check_deterministic
from flowbp_ray.rewards import base, preprocess
from flowbp_ray.rewards.geneval.detect import GRID, box_of, open_detector
from flowbp_ray.rewards.geneval.metric import GenEval
from flowbp_ray.rewards.geneval.soft_detect import propose
from flowbp_ray.rewards.geneval.soft_metric import SoftGenEval
from tests.rewards.geneval.test_detectors import picture
from tests.rewards.geneval.test_metric import write

SIZE = (48, 80)
KINDS = ("mask2former", "owlvit", "owlv2")
TASKS: list[dict[str, Any]] = [
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "person", "count": 1, "position": ["left of", 0]}],
        "prompt": "a person left of a dog",
    },
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "two dogs",
    },
]
TEXTS = [task["prompt"] for task in TASKS]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.stack([picture(*SIZE, seed=seed) for seed in range(3)])


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest, clip: Path, tmp_path: Path) -> dict[str, Any]:
    path = write(tmp_path / "prompts.jsonl", TASKS)
    return {"detector": str(request.getfixturevalue(request.param)), "clip": str(clip), "prompts": str(path)}


def test_gradient_is_that_of_finite_differences(options: dict, images: Tensor, request: pytest.FixtureRequest) -> None:
    """In fp64; transformers' OWL takes its softmax in fp32, so the step is long there and curvature shows."""
    owl = "owl" in request.node.name
    step, near = (3e-5, 0.1) if owl else (1e-7, 1e-6)
    reward = SoftGenEval(**options, dtype="float64")
    x = images.double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(x, TEXTS).sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0.1).all()
    for index, text in enumerate(TEXTS):
        way = gradient[index : index + 1] / gradient[index].norm()
        with torch.no_grad():
            ahead, behind = (reward.score(x[index : index + 1] + s * way, [text]) for s in (step, -step))
        slope = ((ahead - behind) / (2 * step)).item()
        assert slope == pytest.approx(gradient[index].norm().item(), rel=near)


def test_what_is_proposed_is_what_the_metric_finds(options: dict, images: Tensor) -> None:
    """Boxes, masks and scores of all classes. Above 0.6 no query stands for two."""
    detector = open_detector(Path(options["detector"]), ["dog"])
    proposed = propose(detector, images[0], 1e-7)
    found = sorted(detector.find(images[0], 0.6), key=lambda d: -d.score)
    scores = proposed.log_scores.exp()
    mine = [proposed.detection(int(p), proposed.labels[c]) for p, c in (scores > 0.6).nonzero().tolist()]
    mine.sort(key=lambda d: -d.score)
    assert len(mine) == len(found) > 0
    for one, other in zip(mine, found, strict=True):
        assert one.noun == other.noun and one.score == pytest.approx(other.score, abs=1e-3)
        assert one.box == pytest.approx(other.box, abs=0.05)
    if proposed.inside is not None:  # the expected box is that of the mask, on the grid on which masks are cut
        scale = torch.tensor([80.0, 48.0, 80.0, 48.0]) / GRID
        for index in (scores.amax(1) > 0.6).nonzero().flatten().tolist():
            if proposed.inside[index].any():
                exact = torch.tensor(box_of(proposed.inside[index])) * scale
                torch.testing.assert_close(proposed.boxes[index].detach(), exact)


def test_without_softness_it_is_the_metric(options: dict, images: Tensor, tmp_path: Path) -> None:
    """Of what the detector sees: as many, one more, in the colour that CLIP names and in another."""
    metric, tasks = GenEval(**options), []
    for index, image in enumerate(images):
        seen = sorted(metric.detector.find(image, 0.35), key=lambda d: -d.score)
        if not seen:
            continue
        noun = seen[0].noun
        (colour,) = metric.colours.name(image, noun, seen[:1])
        for hue in (colour, "white" if colour != "white" else "black"):
            tasks.append((index, {"class": noun, "count": 1, "color": hue}))
        kept = [d for d in seen if d.noun == noun]
        tasks.append((index, {"class": noun, "count": min(len(kept), 16)}))
    rows = [{"tag": "colors", "include": [part], "prompt": str(n)} for n, (_, part) in enumerate(tasks)]
    own = {**options, "prompts": str(write(tmp_path / "own.jsonl", rows)), "threshold": 0.35}
    pictures, prompts = images[[index for index, _ in tasks]], [row["prompt"] for row in rows]
    expected = GenEval(**own).score(pictures, prompts)
    chances = SoftGenEval(**own, softness=1e-4).score(pictures, prompts).exp()
    torch.testing.assert_close(chances.detach(), expected, atol=1e-2, rtol=0)
    assert {0.0, 1.0} == set(expected.tolist())


def test_rows_are_alone_and_no_picture_is_no_score(options: dict, images: Tensor) -> None:
    reward = base.build("soft_geneval", **options)
    whole = reward.score(images, TEXTS)
    assert whole.dtype == torch.float32 and (whole <= 0).all()
    for index, text in enumerate(TEXTS):
        torch.testing.assert_close(reward.score(images[index : index + 1], [text])[0], whole[index])
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    scores = reward.score(broken, TEXTS)
    assert torch.equal(scores.isnan(), torch.tensor([False, True, False]))


@pytest.mark.parametrize("options", ["mask2former"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softness": 0.0}, r"'soft_geneval': options\.softness must be above 0, got 0\.0"),
        ({"detector": None}, r"'soft_geneval' needs options\.detector"),
        ({"clip": "/nowhere"}, r"'soft_geneval': options\.clip is '/nowhere', which does not exist"),
        ({"max_objects": 1}, r"'two dogs' asks for 2 × dog, and no more than options\.max_objects=1"),
        ({"threshold": 2}, "threshold score must lie in 0..1"),
    ],
)
def test_options_are_checked_without_building(options: dict, change: dict, message: str) -> None:
    base.check("soft_geneval", options)
    base.check_trainable("soft_geneval")
    with pytest.raises(ValueError, match=message):
        base.check("soft_geneval", {**options, **change})


@pytest.mark.parametrize("options", ["mask2former"], indirect=True)
def test_prompts_that_cannot_be_judged_are_refused(options: dict, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'soft_geneval': the prompt 'a bench' is not in options\.prompts"):
        SoftGenEval(**options).score(images[:1], ["a bench"])
    with pytest.raises(ValueError, match=r"'a cat' is not in options\.prompts"):
        base.check_prompts("soft_geneval", options, [*TEXTS, "a cat"])
    never = {**TASKS[2], "exclude": [{"class": "dog", "count": 2}]}
    with pytest.raises(ValueError, match=r"no picture has both; take it out of options\.prompts"):
        base.check("soft_geneval", {**options, "prompts": str(write(tmp_path / "never.jsonl", [never]))})


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 32), (100, 70)])
def test_the_resize_with_a_gradient_is_the_metric_s(how: str, size: tuple[int, int]) -> None:
    image = picture(48, 80)
    smooth = preprocess.resize(image, *size, how).clamp(0, 1)
    torch.testing.assert_close(smooth, preprocess.resize_clamped(image, *size, how), atol=1e-4, rtol=0)


def test_a_deterministic_run_on_a_gpu_refuses_it() -> None:
    term = TermConfig.model_validate({"name": "mine", "kind": "soft_geneval"})
    config = loading.load("shapes_flowbp_sparse")
    rewards = config.rewards.model_copy(update={"terms": [term], "gpus": 1.0})
    cluster = config.cluster.model_copy(update={"deterministic": True})
    check_deterministic(config.model_copy(update={"rewards": rewards}))
    with pytest.raises(ValueError, match="'mine' has no deterministic gradient on a GPU"):
        check_deterministic(config.model_copy(update={"rewards": rewards, "cluster": cluster}))
