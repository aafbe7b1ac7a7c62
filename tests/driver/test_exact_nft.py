"""Terms without gradient on real Ray: the weights are those of one process, whatever happens to the pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowbp_ray import driver
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import Loop
from flowbp_ray.local import LocalLoop
from flowbp_ray.run.folder import Run
from tests.driver import faulty
from tests.driver.chaos import Killer, before_step
from tests.driver.faulty import REWARDS, SAMPLERS, instead
from tests.learning.forward_steps import RED
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray
long = pytest.mark.long

AVERAGE = ["nft.policy=average", "learners.ema.decay=0.5", "learners.ema.ramp=0.2"]
VERIFIER = "{name: shapes_verifier, gradient: none}"
PURE = ["method=null", f"rewards.terms=[{VERIFIER}]"]
MIXED = [f"rewards.terms=[{{name: shapes_clip}}, {VERIFIER}, {RED}]", "backbone.guidance=3"]
ZERO2 = ["learners.engine=deepspeed", "learners.count=2", "learners.zero=2"]


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    """Four prompts of three images, in items of two rows, so that an item has images of two prompts."""
    groups = ["data.prompts=shapes:train", "data.prompts_per_step=4", "data.images_per_prompt=3"]
    return small_config(tmp_path, "flowbp_sparse", *groups, "learners.optimizer.lr=1e-3", *overrides)


def trained(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.metrics() if line["kind"] == "train"]


def told(line: dict[str, Any]) -> dict[str, Any]:
    """What a step's line says of learning from scores."""
    return {key: value for key, value in line.items() if key.startswith(("nft_", "old_", "score", "grad_norm"))}


def average(run: Run, step: int) -> dict[str, torch.Tensor]:
    return run.checkpoints.weights(step, average=True)[1]


@pytest.mark.parametrize("samplers", [2, pytest.param(1, marks=long)])
def test_a_pure_run_drawn_by_the_average_is_one_process_s(local_ray: Any, tmp_path: Path, samplers: int) -> None:
    """Digest, current weights and average in the checkpoint, and what is logged of each step."""
    settings = config(tmp_path, *PURE, *AVERAGE, f"samplers.count={samplers}")
    run, summary = driver.train(settings)
    loop = LocalLoop(settings)
    reports = [loop.step(step) for step in range(2)]
    assert summary["weights_sha256"] == loop.learner.digest()
    engine: Any = loop.learner.engine
    for ema in (False, True):
        step, saved = run.checkpoints.weights(average=ema)
        want = engine.weights(ema)
        assert step == 2 and saved.keys() == want.keys() and all(torch.equal(saved[k], want[k]) for k in want)
    assert not torch.equal(*(torch.cat([t.flatten() for t in engine.weights(e).values()]) for e in (False, True)))
    lines = trained(run)
    assert [line["grad_norm"] for line in lines] == pytest.approx([report.grad_norm for report in reports])
    losses = [sum(x for x in r.forward_loss if x == x) / sum(x == x for x in r.forward_loss) for r in reports]
    assert [line["nft_loss"] for line in lines] == pytest.approx(losses)
    assert all(0 <= line["nft_alike"] < 1 and line["nft_unscored"] == 0 for line in lines)


@pytest.mark.parametrize("samplers", [2, pytest.param(1, marks=long)])
def test_a_mixed_run_is_one_process_s(local_ray: Any, tmp_path: Path, samplers: int) -> None:
    settings = config(tmp_path, *MIXED, f"samplers.count={samplers}")
    run, summary = driver.train(settings)
    assert summary["weights_sha256"] == local_digest(settings)
    named = {"reward_grad_cosine/shapes_verifier,red", "reward_grad_norm/red", "nft_loss"}
    assert all(named <= line.keys() for line in trained(run))


@long
@pytest.mark.parametrize("more", [AVERAGE, []], ids=["average", "current"])
def test_a_stale_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    local_ray: Any, tmp_path: Path, more: list[str]
) -> None:
    """Staleness 1: the older version that draws the next batch comes from the checkpoint."""
    shared = ["steps=4", "checkpoint.every=2", "staleness=1", *PURE, *more]
    whole, want = driver.train(config(tmp_path, *shared, "name=whole"))
    stopped = config(tmp_path, *shared, "name=stopped", "resume=auto")

    class Crash(Exception):
        """Stands for whatever ends a driver without warning."""

    def crash(_: Loop) -> None:
        raise Crash

    with before_step(3, crash), pytest.raises(Crash):
        driver.train(stopped)
    run, summary = driver.train(stopped)
    assert summary["weights_sha256"] == want["weights_sha256"]
    assert [line["version"] for line in trained(run)] == [0, 0, 1, 2]
    assert [told(line) for line in trained(run)] == [told(line) for line in trained(whole)]
    if more:
        one, two = average(run, 4), average(whole, 4)
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert trained(run)[1]["old_distance"] > 0 == trained(run)[0]["old_distance"]


@long
def test_killed_processes_change_nothing(local_ray: Any, tmp_path: Path) -> None:
    settings = config(tmp_path, *PURE, *AVERAGE, "steps=4", "samplers.count=3", "cluster.tries=8")
    calls = ["SleepySampler.rollout", "SleepyReward.score", "SleepySampler.rollout"]
    sleepy = (instead(*SAMPLERS, faulty.SleepySampler), instead(*REWARDS, faulty.SleepyReward))
    with sleepy[0], sleepy[1], Killer(calls, seed=1) as killer:
        run, summary = driver.train(settings)
    assert len(killer.killed) == 3 and run.metrics()[-1]["retries"] >= 3
    assert summary["weights_sha256"] == local_digest(settings)


@long
@pytest.mark.deepspeed
@pytest.mark.parametrize("more", [[*PURE, *AVERAGE], MIXED], ids=["pure", "mixed"])
def test_ranks_with_different_numbers_of_rows(local_ray: Any, tmp_path: Path, more: list[str]) -> None:
    """ZeRO-2 on two ranks, where prompts whose images are alike leave one rank less to learn from than the other.

    The bound is fp32's: in one process other micro-batches alone move the weights by up to 6e-6 of their norm (mixed)
    and 2e-6 (pure), because Adam's first steps divide by small moments. Learning moves them by 2e-2.
    """
    shared = ["steps=3", "learners.base_penalty.weight=0.1", *more]
    run, _ = driver.train(config(tmp_path, *shared, *ZERO2))
    settings = config(tmp_path, *shared)
    loop, uneven = LocalLoop(settings), []
    start = whole(loop.learner.engine.weights())  # type: ignore[attr-defined]
    for step in range(3):
        report = loop.step(step)
        live = [loss == loss for loss in report.forward_loss]
        uneven.append(sum(live[:6]) != sum(live[6:]))
    got, want = whole(run.checkpoints.weights()[1]), whole(loop.learner.engine.weights())  # type: ignore[attr-defined]
    assert any(uneven) or more is MIXED
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
    assert float((start - want).norm()) > 1e-2 * float(want.norm())


@long
def test_a_bad_sample_leaves_the_others_of_its_prompt(local_ray: Any, tmp_path: Path) -> None:
    """Its velocity is not finite: the run goes on without it, and the others are compared among themselves."""
    settings = config(tmp_path, *PURE, "steps=3", "nonfinite=skip_sample")
    with instead(*SAMPLERS, faulty.NanVelocitySampler):
        run, _ = driver.train(settings)
    lines = trained(run)
    assert [line["kept"] for line in lines] == pytest.approx([1.0, 11 / 12, 1.0])
    assert [line["nft_unscored"] for line in lines] == [0.0, 0.0, 0.0]


def whole(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten().clone() for name in sorted(tensors)])
