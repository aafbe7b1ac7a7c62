"""Weights by broadcast (over gloo) on real Ray: the digest of the object store, whoever dies, comes or goes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import transport
from flowbp_ray import driver
from flowbp_ray.control import scaling
from flowbp_ray.driver import Loop
from flowbp_ray.run.folder import Run
from tests.driver import faulty
from tests.driver.chaos import Killer, before_step
from tests.driver.faulty import SAMPLERS, instead
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray
long = pytest.mark.long

SENT = "cluster.transport=nccl"
ZERO = ["learners.engine=deepspeed", "learners.count=2", "learners.ema.decay=0.9"]
EVALUATED = ["evaluation.prompts=shapes:dev", "evaluation.limit=4", "evaluation.every=2", "evaluation.pictures=4"]


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of the versions that learners were asked to store."""
    asked: list[int] = []
    original = transport.store

    def store(learners: Any, buckets: Any, version: Any) -> Any:
        asked.append(version.step)
        return original(learners, buckets, version)

    monkeypatch.setattr(transport, "store", store)
    return asked


def log_of(run: Run) -> str:
    return (run.folder / "log.txt").read_text()


def test_no_version_goes_through_the_object_store_but_the_saved_one(
    local_ray: Any, tmp_path: Path, stores: list[int]
) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "steps=3", "samplers.count=2", "data.rollout_batch=1", SENT)
    run, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)
    assert stores == [3] and "by broadcast" not in log_of(run)


@pytest.mark.long
def test_samplers_that_are_killed_cost_no_version(local_ray: Any, tmp_path: Path, stores: list[int]) -> None:
    """Two are killed in the middle of an item; who then lacks a version gets it from the object store."""
    pools = ["samplers.count=2", "cluster.tries=8", "data.rollout_batch=1", "cluster.stall_timeout=60"]
    config = small_config(tmp_path, "flowbp_bridge", "steps=4", *pools, SENT)
    with instead(*SAMPLERS, faulty.SleepySampler), Killer(["SleepySampler.rollout"] * 2, seed=1) as killer:
        run, summary = driver.train(config)
    assert len(killer.killed) == 2 and run.metrics()[-1]["retries"] >= 2
    assert summary["weights_sha256"] == local_digest(config)
    assert set(stores) <= {0, 1, 2, 3, 4} and 4 in stores


def scale(sizes: dict[int, int]) -> Callable[[Loop], None]:
    """Ask for another number of samplers after these steps."""

    def ask(loop: Loop) -> None:
        original = loop.scaler.between

        def between(step: int, metrics: Any) -> None:
            if step in sizes:
                scaling.request(loop.run, {"samplers": sizes[step]})
            original(step, metrics)

        loop.scaler.between = between  # type: ignore[method-assign]

    return ask


@pytest.mark.long
def test_a_pool_that_grows_and_shrinks_has_the_same_digest(local_ray: Any, tmp_path: Path) -> None:
    """1 to 3 to 2 samplers at staleness 1, with averages that evaluations take from the object store."""
    shared = ["steps=6", "staleness=1", "data.rollout_batch=1", "samplers.min=1", "samplers.max=3"]
    shared += ["learners.ema.decay=0.9", *EVALUATED]
    _, want = driver.train(small_config(tmp_path, "flowbp_sparse", *shared, "name=stored"))
    config = small_config(tmp_path, "flowbp_sparse", *shared, SENT, "name=sent")
    with before_step(0, scale({0: 3, 3: 2})):
        run, summary = driver.train(config)
    assert summary["weights_sha256"] == want["weights_sha256"] and summary["guidance"] == want["guidance"]
    lines = [line for line in run.metrics() if line["kind"] == "train"]
    assert [line["count/samplers"] for line in lines][1:4] == [3, 3, 3] and lines[-1]["count/samplers"] == 2


def kill_rank(loop: Loop) -> None:
    os.kill(ray.get(loop.fleet.learners.ranks[0].pid.remote()), signal.SIGKILL)


@pytest.mark.deepspeed
@pytest.mark.parametrize("zero", [pytest.param(zero, marks=long) for zero in (0, 1, 3)])
def test_learners_that_are_built_again_broadcast_again(local_ray: Any, tmp_path: Path, zero: int) -> None:
    shared = ["steps=4", "staleness=1", "checkpoint.every=2", "samplers.count=2", *ZERO, f"learners.zero={zero}"]
    _, want = driver.train(small_config(tmp_path, "flowbp_sparse", *shared, "name=stored"))
    config = small_config(tmp_path, "flowbp_sparse", *shared, SENT, "name=sent")
    with before_step(3, kill_rank):
        run, summary = driver.train(config)
    assert summary["weights_sha256"] == want["weights_sha256"]
    assert run.metrics()[-1]["incarnation"] == 1 and "building the learners again" in log_of(run)
