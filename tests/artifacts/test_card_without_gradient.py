"""What the card and the summary say of terms without gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from flowbp_ray.artifacts.card_phrases import describe_judge, describe_method
from flowbp_ray.artifacts.export import export
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.run.folder import Run
from tests.artifacts.exporting import trained_run
from tests.small import small_config

SCORED = "{name: shapes_clip_heldout, gradient: none, weight: 2}"
GROUPS = ["steps=1", "data.images_per_prompt=2", "data.prompts_per_step=2", "backbone.guidance=2"]
GROUPS += ["evaluation={prompts: 'shapes:heldout', limit: 2, batch: 2, every: 1, num_steps: 2}"]
AVERAGE = ["nft={beta: 0.5, clip: 3, times: 1, std: prompt, policy: average}", "learners.ema={decay: 0.5, ramp: 0.1}"]
KINDS = {
    "pure": ["method=null", f"rewards.terms=[{SCORED}]", *GROUPS, *AVERAGE],
    "mixed": [f"rewards.terms=[{{name: shapes_clip}}, {SCORED}]", *GROUPS],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_says_how_each_term_was_learned(kind: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", *KINDS[kind], "checkpoint.every=1")
    run = trained_run(config)
    assert Run.open(run.folder).config == config
    export(Run.open(run.folder), tmp_path / "out", average=kind == "pure")
    text = (tmp_path / "out" / "README.md").read_text()
    tags = ModelCard.load(tmp_path / "out" / "README.md").data.tags
    summary = json.loads((run.folder / "summary.json").read_text())
    assert "shapes_clip_heldout (trained on)" in text
    if kind == "pure":
        assert "post-trained by DiffusionNFT with" in text and tags[3:] == ["diffusionnft"]
        assert "| rewards | shapes_clip_heldout (weight 2, without gradient, by DiffusionNFT (beta 0.5, clip 3, times 1, std prompt, policy average)) |" in text  # fmt: skip  # noqa: E501
        assert "| method | none: no term has a gradient |" in text and "| negative branch | none |" in text
        assert summary["method"] is None
    else:
        assert "post-trained by reward backpropagation and DiffusionNFT with" in text
        assert tags[3:] == ["reward-backpropagation", "diffusionnft"]
        assert "shapes_clip (weight 1, clip 1, scale 1); shapes_clip_heldout (weight 2, without gradient, by " in text
        assert "| negative branch | detached |" in text and summary["method"]["name"] == "flowbp_sparse"


def test_judges_are_said_to_be_what_they_were() -> None:
    made = {"name": "look", "url": "http://127.0.0.1:9", "template": {"kind": "yes_no"}}
    used = {"reward": "its scores were trained on", "gate": "weighed each sample's loss", "monitor": "measured only"}
    for role, what in used.items():
        judge = JudgeConfig.model_validate(made | {"role": role})
        assert describe_judge(judge) == f"look (the model of a running server, asked by yes_no, {what})"
    assert describe_method({"name": "refl"}).startswith("`refl(")
