"""One optimizer step of the whole loop in one process on each family: no other part of the library names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbp_ray.config import loading
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Version
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.run.folder import Run
from tests.backbones import tiny
from tests.backbones.families import run_config
from tests.conftest import Saved


@pytest.mark.parametrize(
    "dtype, method", [("float32", "flowbp_bridge"), ("float32", "draft_lv"), ("bfloat16", "flowbp_bridge")]
)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_step_trains(saved: Saved, tmp_path: Path, name: str, dtype: str, method: str) -> None:
    overrides = [f"backbone.dtype={dtype}", "drift.meter=true", "learners.base_penalty={weight: 1.0}"]
    loop = LocalLoop(run_config(name, saved(name)[0], tmp_path, method, *overrides))
    before = loop.learner.digest()
    report = loop.step(0)
    assert not report.faults and report.grad_norm > 0 and loop.learner.digest() != before
    # the meters compare the same weights at the same states: rounding only
    assert len(report.drift) == 2 and max(report.drift) < (1e-4 if dtype == "float32" else 0.1)
    assert len(report.base_distance) == 2 and max(report.base_distance) < (1e-8 if dtype == "float32" else 0.01)


def test_an_evaluation_takes_its_own_number_of_steps(tmp_path: Path) -> None:
    config = loading.load("sd35_refl", [f"output={tmp_path}"])
    evaluator = Evaluator(config, Run(tmp_path), [PromptRecord("a circle", {})], offset=0)
    assert [item.num_steps for item in evaluator._items(Version(0, 0), 3.5)] == [40]
