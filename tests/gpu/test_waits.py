"""Where the host waits for the GPU: not in a rollout's steps, not in a learner's forwards, and a stated few around."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Rollout, RolloutReport
from tests.backbones import tiny
from tests.conftest import Saved
from tests.gpu.meters import Waits
from tests.gpu.runs import EMA, INT8, LORA, METER, NF4, PENALTY, config_of

pytestmark = pytest.mark.gpu

PER_FORWARD = {"qwen_image": 1}
"""Qwen-Image's rows of several lengths need a mask, with which diffusers moves a number to the GPU in each forward. No
other family may wait at all."""

AROUND_ROLLOUT = 5
"""The noise up; states, velocities, the meter's and the base's down, once each; not a number per step."""
AROUND_SWEEP = 4
"""The gradient's norm; after all forwards whether values are finite, the drift, the distance to the base."""
AROUND_SCORE = 14
"""Targets, jitter's draws and Qwen-Image's scales up; cotangents, scores, losses, products and what is finite down."""


def rolled(loop: LocalLoop, step: int = 0) -> tuple[Waits, RolloutReport, Rollout, object]:
    published = list(loop.learner.publish())
    item = loop.items(step)[0]
    loop.sampler.ensure_version(item.version, lambda: published)
    with Waits() as waits:
        report, kept, target = loop.sampler.rollout(item, lambda: published)
    return waits, report, kept, target


@pytest.mark.parametrize(
    "family, base", [*((family, LORA) for family in (*tiny.NAMES, "shapes")), ("flux1", INT8), ("sd35", NF4)]
)
def test_no_step_of_a_rollout_waits(saved: Saved, tmp_path: Path, family: str, base: list[str]) -> None:
    """As many waits with eight steps as with four, few of them."""
    counts, per_forward = [], PER_FORWARD.get(family, 0)
    for steps in (4, 8):
        overrides = [f"backbone.num_steps={steps}", *METER, *PENALTY, *base]
        loop = LocalLoop(config_of(family, saved, tmp_path / str(steps), "flowbp_bridge", *overrides))
        rolled(loop)  # Qwen-Image's first forward in a process moves its table of positions
        waits = rolled(loop, 1)[0]
        counts.append(waits.total)
        assert waits.total <= AROUND_ROLLOUT + per_forward * (steps + 2), waits  # the base's two guided forwards too
    assert per_forward or counts[0] == counts[1], waits


@pytest.mark.parametrize(
    "family, base", [*((family, []) for family in (*tiny.NAMES, "shapes")), ("sd35", INT8), ("flux1", NF4)]
)
def test_no_forward_of_a_learner_waits(saved: Saved, tmp_path: Path, family: str, base: list[str]) -> None:
    """With one row at a time and with two at a time: the same few waits around the sweep, whatever its forwards."""
    found, per_forward = [], PER_FORWARD.get(family, 0)
    for micro in (1, 2):
        overrides = [f"learners.micro_batch={micro}", *METER, *PENALTY, *EMA, *base]
        loop = LocalLoop(config_of(family, saved, tmp_path / str(micro), "flowbp_bridge", *overrides))
        loop.step(0)
        _, report, kept, target = rolled(loop, 1)
        texts = [loop.texts[i] for i in kept.item.prompt_ids]
        loop.scorer.score(kept.item, texts, report, target)  # type: ignore[arg-type]  # now it knows the prompts
        with Waits() as scoring:
            _, cotangent = loop.scorer.score(kept.item, texts, report, target)  # type: ignore[arg-type]
        assert scoring.total <= AROUND_SCORE, scoring
        with Waits() as waits:
            done = loop.learner.step(1, [kept], [cotangent], (1.0,) * kept.item.rows)
        found.append((waits.total, done.forwards))
        assert waits.total <= AROUND_SWEEP + per_forward * done.forwards, waits
    (fine, many), (coarse, few) = found
    assert many > few and (per_forward or fine == coarse), waits


def test_a_wait_in_the_loop_is_noticed(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meter is no stranger to what it should see: a velocity that looks at a value costs a wait per step."""
    loop = LocalLoop(config_of("sd35", saved, tmp_path, "flowbp_bridge"))
    before = rolled(loop)[0].total
    backbone = type(loop.sampler.backbone)
    predict = backbone.predict

    def looking(self: object, transformer: object, x: torch.Tensor, *rest: object) -> torch.Tensor:
        assert x.abs().sum() > 0
        return predict(self, transformer, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone, "predict", looking)
    assert rolled(loop)[0].total == before + loop.config.backbone.num_steps
