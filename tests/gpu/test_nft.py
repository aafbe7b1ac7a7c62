"""Terms without gradient on the stand-in: the step is the CPU's, and no forward of it waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.selection import select
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import ScoredItem
from tests.backbones import tiny
from tests.conftest import Saved
from tests.gpu.meters import Waits
from tests.gpu.runs import BF16, EMA, LORA, METER, PENALTY, config_of, on_cpu, one_step, plain_attention, relative
from tests.gpu.test_waits import AROUND_ROLLOUT, PER_FORWARD
from tests.learning.forward_steps import RED

pytestmark = pytest.mark.gpu

GROUPS = ["data.prompts_per_step=2", "data.images_per_prompt=2", "data.rollout_batch=4"]
PURE = ["method=null", f"rewards.terms=[{RED}]", *GROUPS]
MIXED = [f"rewards.terms=[{{name: shapes_clip}}, {RED}]", *GROUPS]

CASES: list[tuple[str, list[str]]] = [
    ("shapes", [*PURE, *EMA, *PENALTY, "backbone.guidance=3"]),
    ("shapes", [*MIXED, *METER, *PENALTY]),
    ("sd35", [*PURE, *BF16, *LORA]),
    ("flux1", [*MIXED, *METER]),
    ("flux2", [*PURE, *LORA, *PENALTY]),
    ("qwen_image", [*MIXED, *BF16, *LORA]),
]
QUICK = ("shapes", "sd35")
MARKED = [pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.long) for case in CASES]
AROUND = 3
"""The gradient's norm; after all forwards what they measured, and whether values are finite; of a pure run no more."""
AROUND_MIXED = 6
"""Those, and what the sweep's own forwards measured and whether it is finite, the distance to the base among them."""


def made(family: str, saved: Saved, folder: Path, more: list[str]) -> RunConfig:
    return config_of(family, saved, folder, "flowbp_sparse", *more)


@pytest.mark.parametrize("family, more", MARKED, ids=[f"{f}-{'pure' if PURE[0] in m else 'mixed'}" for f, m in CASES])
def test_a_step_on_the_gpu_is_the_cpu_s(saved: Saved, tmp_path: Path, family: str, more: list[str]) -> None:
    config = made(family, saved, tmp_path, more)
    there = one_step(LocalLoop(config))
    with plain_attention():
        here = one_step(LocalLoop(on_cpu(config)))
    exact = config.backbone.torch_dtype == torch.float32
    near = 1e-5 if exact else 3e-2
    for mine, theirs in zip(there.targets, here.targets, strict=True):
        assert relative(mine, theirs) <= near
    assert there.scores == pytest.approx(here.scores, rel=near, abs=near)
    # scores that are near one another are compared: their rounding counts several times
    assert there.report.grad_norm == pytest.approx(here.report.grad_norm, rel=1e-3 if exact else 0.1)
    assert there.report.forward_loss == pytest.approx(here.report.forward_loss, rel=1e-3 if exact else 0.1)
    assert there.report.signal == pytest.approx(here.report.signal, rel=1e-3 if exact else 0.1)
    assert relative(there.change, here.change) <= (1e-2 if exact else 0.5)  # Adam's first step is nearly a sign
    assert not there.report.faults and there.report.grad_norm > 0


@pytest.mark.parametrize("kind", ["pure", "mixed"])
@pytest.mark.parametrize("family", ["shapes", *(pytest.param(name, marks=pytest.mark.long) for name in tiny.NAMES)])
def test_no_forward_waits(saved: Saved, tmp_path: Path, family: str, kind: str) -> None:
    """With one row at a time and with two: the same few waits around, in a rollout and in a learner's step."""
    found, per_forward = [], PER_FORWARD.get(family, 0)
    shared = [*PURE, *EMA, *PENALTY] if kind == "pure" else [*MIXED, *METER, *PENALTY, *EMA]
    for micro in (1, 2):
        loop = LocalLoop(made(family, saved, tmp_path / str(micro), [*shared, f"learners.micro_batch={micro}"]))
        loop.step(0)
        published, [item] = list(loop.learner.publish()), loop.items(1)
        loop.sampler.ensure_version(item.version, lambda p=published: p)  # type: ignore[misc]
        with Waits() as rolling:
            report, rollout, target = loop.sampler.rollout(item, list)
        # x0's noised states up and the old velocities down are two more; the base's are counted there
        assert rolling.total <= AROUND_ROLLOUT + 2 + per_forward * 12, rolling
        scored, cotangent = loop.scorer.score(item, [loop.texts[i] for i in item.prompt_ids], report, target)
        done = [ScoredItem(item, report, scored, rollout, cotangent)]
        chosen = select(done, (), loop.config.rewards).beside(done, loop.config)
        [optimality] = chosen.optimality(1, loop.config)
        assert optimality is not None
        with Waits() as waits:
            told = loop.learner.step(1, [rollout], [cotangent], chosen.factors, (), optimality)
        found.append((waits.total, told.forwards))
        around = AROUND if kind == "pure" else AROUND_MIXED
        assert waits.total <= around + per_forward * told.forwards, waits
    (fine, many), (coarse, few) = found
    assert many > few and (per_forward or fine == coarse), waits
