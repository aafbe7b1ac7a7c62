"""GenEval in a run's own parts: checked before it starts, scored by its reward server, reported by tag."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.estimates import measure
from flowbp_ray.messages import Item, Version, pack
from flowbp_ray.preflight import check
from tests.small import scorer_of, small_config

# prompts that the embedded model can read, with things that the tiny detector knows
LINES = [
    {"tag": "single_object", "include": [{"class": "person", "count": 1}], "prompt": "a red circle"},
    {"tag": "single_object", "include": [{"class": "couch", "count": 9}], "prompt": "a blue square"},
    {"tag": "colors", "include": [{"class": "tv", "count": 1, "color": "red"}], "prompt": "a green star"},
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def config(tmp_path: Path, mask2former: Path, clip: Path, prompts: Path, *overrides: str) -> RunConfig:
    geneval = (
        f"{{name: objects, kind: geneval, options: {{detector: {mask2former}, clip: {clip}, prompts: {prompts}}}}}"
    )
    settings = [f"rewards.monitors=[{geneval}]", f"evaluation.prompts={prompts}", *overrides]
    return small_config(tmp_path, "flowbp_sparse", *settings)


def test_an_evaluation_reports_it_by_tag(tmp_path: Path, mask2former: Path, clip: Path, prompts: Path) -> None:
    run = config(tmp_path, mask2former, clip, prompts)
    records = check(run).held_out
    assert [r.text for r in records] == ["a red circle", "a blue square", "a green star"]
    latents = torch.randn(
        3, *build_backbone(run.backbone).latent_shape(64, 64), generator=torch.Generator().manual_seed(0)
    )
    latents[2, 0, 0, 0] = torch.nan
    item = Item(
        purpose="evaluation",
        step=0,
        index=0,
        prompt_ids=(0, 1, 2),
        samples=(0, 1, 2),
        plans=(),
        seed=0,
        num_steps=6,
        guidance=1.0,
        version=Version(0, 0),
    )
    scorer = scorer_of(run)
    answer = scorer.evaluate(item, [r.text for r in records], pack(latents))
    person, couches, broken = answer.scores["objects"]
    judge = scorer.rewards["objects"]
    pictures = torch.tensor(answer.images).permute(0, 3, 1, 2) / 255
    assert [person, couches] == judge.score(pictures[:2], ["a red circle", "a blue square"]).tolist()
    assert couches == 0.0 and np.isnan(broken)  # nobody drew nine couches; no picture is no zero

    means = measure(answer.images, records, answer.scores, np.array(answer.drawn)).as_dict()
    assert means["objects/single_object"]["mean"] == (person + couches) / 2
    assert means["objects/colors"]["mean"] is None and means["objects/overall"]["mean"] is None
    assert "shapes_clip" in means and "shapes_clip/overall" not in means  # a score is not a verdict


def test_a_run_with_other_prompts_is_refused(tmp_path: Path, mask2former: Path, clip: Path, prompts: Path) -> None:
    run = config(tmp_path, mask2former, clip, prompts, "evaluation.prompts=shapes:dev")
    with pytest.raises(ValueError, match=r"is not in options\.prompts, nor are \d+ others"):
        check(run)


def test_a_run_that_trains_on_it_is_refused(tmp_path: Path, mask2former: Path, clip: Path, prompts: Path) -> None:
    options = f"{{detector: {mask2former}, clip: {clip}, prompts: {prompts}}}"
    run = config(
        tmp_path,
        mask2former,
        clip,
        prompts,
        f"rewards.terms=[{{name: geneval, options: {options}}}]",
        "rewards.monitors=[]",
    )
    with pytest.raises(ValueError, match="'geneval' has no gradient"):
        check(run)


def test_a_missing_folder_is_named_before_anything_starts(tmp_path: Path, clip: Path, prompts: Path) -> None:
    with pytest.raises(ValueError, match=r"options\.detector is '/nowhere', which does not exist"):
        check(config(tmp_path, Path("/nowhere"), clip, prompts))
