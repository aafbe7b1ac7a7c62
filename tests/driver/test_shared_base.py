"""Sampler and learner in one Ray actor: the weights of two processes, also after the process was killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from flowbp_ray import driver
from flowbp_ray.driver import Loop
from tests.driver.chaos import before_step, during
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray

LORA = ["learners.lora={rank: 4, alpha: 8}", "learners.ema.decay=0.9", "steps=3"]
EVALUATED = ["evaluation.prompts=shapes:dev", "evaluation.limit=4", "evaluation.every=2", "evaluation.pictures=4"]


def pid_of(loop: Loop) -> int:
    learners = loop.fleet.learners
    assert learners.ranks == [loop.fleet.pools["samplers"].handles[0]]
    return int(ray.get(learners.host.pid.remote()))


def test_one_process_trains_what_one_process_without_ray_does(local_ray: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", *LORA, "cluster.share_base=true")
    seen: list[int] = []
    with before_step(1, lambda loop: seen.append(pid_of(loop))):
        _, summary = driver.train(config)
    assert len(seen) == 1 and summary["weights_sha256"] == local_digest(config)


@pytest.mark.long
@pytest.mark.parametrize("when", ["between steps", "while it learns"])
def test_a_killed_process_is_built_again(local_ray: Any, tmp_path: Path, when: str) -> None:
    """Staleness 1, an average and evaluations; against two processes that nothing happens to."""
    own = [*LORA, *EVALUATED, "staleness=1", "checkpoint.every=1"]
    _, undisturbed = driver.train(small_config(tmp_path / "apart", "flowbp_sparse", *own))
    killed: list[int] = []

    def kill(loop: Loop) -> None:
        killed.append(pid_of(loop))
        os.kill(killed[0], signal.SIGKILL)

    shared = small_config(tmp_path / "shared", "flowbp_sparse", *own, "cluster.share_base=true")
    at = before_step(2, kill)
    if when == "while it learns":
        at = during("step", 3, 0.05, lambda group: ray.kill(group.host, no_restart=False))
    with at as called:
        run, summary = driver.train(shared)
    assert called and summary["weights_sha256"] == undisturbed["weights_sha256"]
    assert "building the learners again" in (run.folder / "log.txt").read_text()
