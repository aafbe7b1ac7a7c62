"""Every reward on the stand-in, of its tiny files: scores and gradients are the CPU's."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbp_ray.rewards import base
from tests.gpu import standin
from tests.gpu.runs import relative
from tests.rewards import published_files, test_hpsv3, tiny_clip
from tests.rewards.geneval import tiny
from tests.rewards.tiny_clip import aesthetic, clip, hpsv2

pytestmark = pytest.mark.gpu

TEXTS = ["a red star", "two rings, and a dog!"]
SHAPES = ("a red circle", "two blue squares")
DOGS = [
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": TEXTS[0]},
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": TEXTS[1]},
]


@dataclass
class Case:
    """options: writes a reward's files into a folder and returns what it is built with."""

    kind: str
    options: Callable[[Path], dict[str, Any]]
    texts: tuple[str, ...] = tuple(TEXTS)
    dtype: str = "float32"
    differentiable: bool = True
    size: tuple[int, int] = (72, 64)


def geneval(detector: str) -> Callable[[Path], dict[str, Any]]:
    def options(folder: Path) -> dict[str, Any]:
        made = tiny.mask2former(folder / "d") if detector == "mask2former" else tiny.owl(folder / "d", detector)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in DOGS))
        named = {"detector": made, "clip": tiny.clip(folder / "clip"), "prompts": folder / "prompts.jsonl"}
        return {name: str(path) for name, path in named.items()} | {"threshold": 0.0}

    return options


CASES = {
    "shapes_clip": Case("shapes_clip", lambda folder: {}, SHAPES, size=(64, 64)),
    "shapes_clip_heldout": Case("shapes_clip_heldout", lambda folder: {}, SHAPES, size=(64, 64)),
    "shapes_preference": Case("shapes_preference", lambda folder: {}, SHAPES, size=(64, 64)),
    "shapes_preference_heldout": Case("shapes_preference_heldout", lambda folder: {}, SHAPES, size=(64, 64)),
    "shapes_detector": Case("shapes_detector", lambda folder: {}, SHAPES, size=(64, 64)),
    "shapes_verifier": Case(
        "shapes_verifier",
        lambda folder: {},
        ("only one ring", "only one small star"),
        differentiable=False,
        size=(64, 64),
    ),
    "clipscore": Case("clipscore", clip),
    "clipscore bf16": Case("clipscore", clip, dtype="bfloat16"),
    "pickscore": Case("pickscore", clip),
    "aesthetic": Case("aesthetic", aesthetic),
    "image_reward": Case("image_reward", published_files.write_image_reward, ("a red cat", "the dog on the moon")),
    "hpsv2": Case("hpsv2", hpsv2),
    "hpsv3": Case("hpsv3", test_hpsv3.write_hpsv3, tuple(test_hpsv3.PROMPTS)),
    "ocr": Case("ocr", lambda folder: {}, ('a wall that says "STOP"', "a 'red' door"), differentiable=False),
    **{f"geneval {d}": Case("geneval", geneval(d), differentiable=False) for d in ("mask2former", "owlvit", "owlv2")},
    **{f"soft_geneval {d}": Case("soft_geneval", geneval(d)) for d in ("mask2former", "owlvit", "owlv2")},
}


def scored(case: Case, options: dict[str, Any], device: str) -> list[torch.Tensor]:
    """Scores and their gradient at the images, moved to the host from `device`, where both must be."""
    reward = base.build(case.kind, device, **options)
    images = tiny_clip.pictures(len(case.texts), *case.size).to(device).requires_grad_(case.differentiable)
    score = reward.score(images, list(case.texts))
    found = [score.detach()]
    if case.differentiable:
        found += torch.autograd.grad(score.sum(), images)
    assert {t.device.type for t in found} == {device}
    return [t.cpu() for t in found]


@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_are_the_cpu_s(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    takes = "dtype" in inspect.signature(base.factory(case.kind)).parameters
    options = case.options(tmp_path) | ({"dtype": case.dtype} if takes else {})
    there, here = (scored(case, options, device) for device in (standin.KIND, "cpu"))
    near = 1e-5 if case.dtype == "float32" else 2e-2
    for mine, theirs in zip(there, here, strict=True):
        assert relative(mine.nan_to_num(), theirs.nan_to_num()) <= near
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_every_registered_reward_is_rehearsed() -> None:
    assert {case.kind for case in CASES.values()} == set(base.REWARDS)
