"""What card, summary and terminal say of a run that distilled guidance, beside one that did not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from flowbp_ray.artifacts.card_phrases import caution_of_distillation, describe_penalty, ways_of_learning
from flowbp_ray.artifacts.export import export
from flowbp_ray.artifacts.report import print_summary
from flowbp_ray.run.folder import Run, comparable, differences
from tests.artifacts.exporting import trained_run
from tests.small import small_config

PURE = ["method=null", "rewards.terms=[{name: shapes_clip_heldout, gradient: none}]", "data.images_per_prompt=2"]
HELD = "learners.base_penalty={weight: 10, guidance: 3}"
NOT = [
    [],
    ["learners.base_penalty={weight: 10}"],
    ["learners.base_penalty={weight: 0, guidance: 3}"],
    ["backbone.guidance=3", HELD],
]


def test_a_card_calls_it_distillation_and_asks_for_the_control(tmp_path: Path) -> None:
    evaluated = "evaluation={prompts: 'shapes:heldout', limit: 2, batch: 2, every: 1, num_steps: 2}"
    run = trained_run(small_config(tmp_path, "flowbp_sparse", "steps=1", "checkpoint.every=1", HELD, evaluated))
    export(Run.open(run.folder), tmp_path / "out")
    text, summary = (tmp_path / "out" / "README.md").read_text(), json.loads((run.folder / "summary.json").read_text())
    assert "post-trained by reward backpropagation and guidance distillation with" in text
    assert ModelCard.load(tmp_path / "out" / "README.md").data.tags[3:] == [
        "reward-backpropagation",
        "guidance-distillation",
    ]
    row = "guidance distillation: what is learned at guidance 1 is held to the base at guidance 3, with weight 10"
    assert f"| distance to the base | {row} |" in text and "guidance_scale=1.0" in text
    assert f"**{summary['caution']}**" in text and "distilled guidance 3 of the base" in summary["caution"]
    printed = io.StringIO()
    print_summary(Console(file=printed, width=1000), run.folder, summary)
    assert summary["caution"] in printed.getvalue()


@pytest.mark.parametrize("more", NOT, ids=str)
def test_others_are_not_called_so(tmp_path: Path, more: list[str]) -> None:
    config = small_config(tmp_path, "flowbp_sparse", *more)
    assert ways_of_learning(config) == ["reward backpropagation"] and caution_of_distillation(config) == ""
    weighed = any("weight: 10" in override for override in more)
    assert describe_penalty(config) == ("penalised with weight 10" if weighed else "not penalised")


def test_without_surrogate_the_conditional_velocity_is_what_is_learned(tmp_path: Path) -> None:
    """So even the run's own guidance is distilled there."""
    for guidance in (1, 3):
        config = small_config(tmp_path, "flowbp_sparse", *PURE, HELD, f"backbone.guidance={guidance}")
        assert ways_of_learning(config) == ["DiffusionNFT", "guidance distillation"]
        assert "learned at guidance 1 is held to the base at guidance 3" in describe_penalty(config)


def test_a_run_goes_on_only_with_the_same_guidance_of_the_base(tmp_path: Path) -> None:
    """One whose config.yaml was written before the key was there does."""
    one, other = (
        comparable(small_config(tmp_path, "flowbp_sparse", "learners.base_penalty.weight=1", *more))
        for more in ([], ["learners.base_penalty.guidance=3"])
    )
    assert differences(one, other) == ["learners.base_penalty.guidance was null, is 3.0"]
    earlier = json.loads(json.dumps(one))
    del earlier["learners"]["base_penalty"]["guidance"]
    assert differences(earlier, one) == []
