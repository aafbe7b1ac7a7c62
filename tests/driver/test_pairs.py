"""A sampler and a learner in turns on every GPU: who is where, and the weights of pools that are apart.

The GPUs are Ray's only: it counts four that are not there, and processes that are given one compute on the CPU.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from actors.cluster import start_ray
from flowbp_ray import driver
from flowbp_ray.driver import Loop
from flowbp_ray.utils import accelerator
from tests.driver.chaos import before_step
from tests.paths import ROOT
from tests.small import small_config

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

TWO = ["learners.engine=deepspeed", "learners.count=2", "samplers.count=2", "learners.micro_batch=2"]


def compute_on_cpu() -> None:
    """Ray's worker_process_setup_hook: what is called a GPU is the CPU."""
    accelerator.KIND = "cpu"


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import ray

    monkeypatch.setattr(accelerator, "KIND", "cpu")
    hook = {
        "worker_process_setup_hook": "tests.driver.test_pairs.compute_on_cpu",
        "env_vars": {"PYTHONPATH": str(ROOT)},
    }
    start_ray("local", num_cpus=4, num_gpus=4, runtime_env=hook)
    yield ray
    ray.shutdown()


def test_pairs_train_what_separate_pools_do(four_gpus: Any, tmp_path: Path) -> None:
    """Two of four GPUs have a learner and a sampler, also after a sampler was killed, and one has a reward server."""
    config = small_config(tmp_path / "pairs", "flowbp_sparse", *TWO, "cluster.colocate=pairs", "rewards.gpus=0.2")
    seen: list[list[list[str]]] = []

    def gpus(actors: list[Any]) -> list[str]:
        own = lambda self: four_gpus.get_runtime_context().get_accelerator_ids()["GPU"]  # noqa: E731
        return [gpu for ids in four_gpus.get([actor.__ray_call__.remote(own) for actor in actors]) for gpu in ids]

    def look(loop: Loop) -> None:
        pools = loop.fleet.pools
        actors = (loop.fleet.learners.ranks, pools["samplers"].handles, pools["rewards"].handles)
        seen.append([gpus(list(of_role)) for of_role in actors])

    def kill(loop: Loop) -> None:
        look(loop)
        sampler = loop.fleet.pools["samplers"].handles[0]
        killed = four_gpus.get(sampler.pid.remote())
        os.kill(killed, signal.SIGKILL)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with suppress(RayError):  # until Ray has started it again
                if four_gpus.get(sampler.pid.remote()) != killed:
                    break
            time.sleep(0.2)
        look(loop)

    with before_step(1, kill):
        _, together = driver.train(config)
    apart = small_config(tmp_path / "apart", "flowbp_sparse", *TWO, "samplers.gpus=1", "learners.gpus=1")
    _, expected = driver.train(apart)
    assert together["weights_sha256"] == expected["weights_sha256"]
    for learners, samplers, rewards in seen:
        assert learners == samplers and len(set(learners)) == 2 and set(rewards) < set(learners)
    assert len(seen) == 2 and seen[0] == seen[1]
