"""One optimizer step of the whole loop in one process on each family: no other part of the library names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbp_ray import loading
from flowbp_ray.evaluating import Evaluator
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Version
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.run import Run

from . import tiny
from .conftest import Saved


@pytest.mark.parametrize(
    "dtype, method", [("float32", "flowbp_bridge"), ("float32", "draft_lv"), ("bfloat16", "flowbp_bridge")]
)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_step_trains(saved: Saved, tmp_path: Path, name: str, dtype: str, method: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    configs = loading.shipped()
    budget = "k: 2" if method == "flowbp_bridge" else "n: 1"
    (tmp_path / "run.yaml").write_text(
        f"extends: [{configs}/backbones/{name}.yaml, {configs}/methods/{method}.yaml]\n"
        f"name: tiny\nsteps: 1\nmethod: {{{budget}}}\noutput: {tmp_path}\n"
        f"backbone: {{path: {saved(name)[0]}, height: 64, width: 64, num_steps: 4, dtype: {dtype}}}\n"
        f"data: {{prompts: {tmp_path}/prompts.txt, prompts_per_step: 2, rollout_batch: 2}}\n"
        "learners: {engine: torch, micro_batch: 1, gradient_checkpointing: true, base_penalty: {weight: 1.0}, "
        "optimizer: {lr: 1.0e-2}}\n"
        "rewards: {terms: [{name: shapes_clip}]}\ndrift: {meter: true}\n"
    )
    loop = LocalLoop(loading.load(tmp_path / "run.yaml"))
    before = loop.learner.digest()
    report = loop.step(0)
    assert not report.faults and report.grad_norm > 0 and loop.learner.digest() != before
    # the meters compare the same weights at the same states: rounding only
    assert len(report.drift) == 2 and max(report.drift) < (1e-4 if dtype == "float32" else 0.1)
    assert len(report.moved) == 2 and max(report.moved) < (1e-8 if dtype == "float32" else 0.01)


def test_an_evaluation_takes_its_own_number_of_steps(tmp_path: Path) -> None:
    config = loading.load("sd35_refl", [f"output={tmp_path}"])
    evaluator = Evaluator(config, Run(tmp_path), [PromptRecord("a circle", {})], offset=0)
    assert [item.num_steps for item in evaluator._items(Version(0, 0), 3.5)] == [40]
