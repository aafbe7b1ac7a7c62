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
from flowbp_ray.bench import open_loops
from flowbp_ray.benching import profile
from flowbp_ray.benching.measure import bench
from flowbp_ray.driver import Loop
from flowbp_ray.utils import accelerator
from tests.driver.chaos import before_step
from tests.paths import ROOT
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray

PAIRS = ["cluster.colocate=pairs", "rewards.gpus=0.2"]
TWO = ["learners.engine=deepspeed", "learners.count=2", "samplers.count=2"]


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[Any]:
    """A private Ray of this file, in place of the one that other tests share."""
    import ray

    hook = {
        "worker_process_setup_hook": "tests.driver.counted_gpus.compute_on_cpu",
        "env_vars": {"PYTHONPATH": str(ROOT)},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accelerator, "KIND", "cpu")
        shared = ray.is_initialized()
        ray.shutdown()
        start_ray("local", num_cpus=4, num_gpus=4, runtime_env=hook)
        yield ray
        ray.shutdown()
    if shared:
        start_ray("local")


def gpus_of(ray: Any, loop: Loop) -> list[list[str]]:
    """The GPU that Ray gave each learner, sampler and reward server."""
    own = lambda self: ray.get_runtime_context().get_accelerator_ids()["GPU"]  # noqa: E731
    pools = loop.fleet.pools
    roles = (loop.fleet.learners.ranks, pools["samplers"].handles, pools["rewards"].handles)
    return [[gpu for ids in ray.get([a.__ray_call__.remote(own) for a in actors]) for gpu in ids] for actors in roles]


def kill_and_wait(ray: Any, actor: Any) -> None:
    """SIGKILL, and wait until Ray has started the actor again."""
    killed, until = ray.get(actor.pid.remote()), time.monotonic() + 60
    os.kill(killed, signal.SIGKILL)
    while time.monotonic() < until:
        with suppress(RayError):
            if ray.get(actor.pid.remote()) != killed:
                return
        time.sleep(0.1)


@pytest.mark.long
def test_each_pair_has_a_gpu_and_keeps_it(four_gpus: Any) -> None:
    """Emulated actors: four pairs and a reward server beside one of them; a sampler dies, then all learners do."""
    given = profile.load("sd35_m_h100").scaled(0.02, 1 / 2048)
    counts = ["samplers.count=4", "learners.count=4", "rewards.count=1", "encoder.gpus=0", "cluster.stall_timeout=240"]
    seen: list[list[list[str]]] = []

    def look(loop: Loop, step: int) -> None:
        if step == 1:
            seen.append(gpus_of(four_gpus, loop))
            kill_and_wait(four_gpus, loop.fleet.pools["samplers"].handles[2])
            seen.append(gpus_of(four_gpus, loop))
        if step == 2:
            loop.fleet.rebuild()
            seen.append(gpus_of(four_gpus, loop))

    bench("sd35_flowbp_sparse", [*counts, *PAIRS], [counts], 1.0, open_loops, given, meanwhile=look)
    [(learners, samplers, rewards), again, rebuilt] = seen
    assert learners == samplers and len(set(learners)) == 4 and set(rewards) < set(learners)
    assert again == rebuilt == seen[0]


@pytest.mark.long
def test_one_pair_trains_what_one_process_does(four_gpus: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", *PAIRS)
    assert config.samplers.device == config.learners.device == "cpu" and config.samplers.gpus > 0
    _, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.deepspeed
def test_two_pairs_train_what_separate_pools_do(four_gpus: Any, tmp_path: Path) -> None:
    """Also where a sampler dies and starts again on its GPU."""
    seen: list[list[list[str]]] = []

    def kill(loop: Loop) -> None:
        seen.append(gpus_of(four_gpus, loop))
        kill_and_wait(four_gpus, loop.fleet.pools["samplers"].handles[0])
        seen.append(gpus_of(four_gpus, loop))

    with before_step(1, kill):
        _, together = driver.train(small_config(tmp_path / "pairs", "flowbp_sparse", *TWO, *PAIRS))
    apart = small_config(tmp_path / "apart", "flowbp_sparse", *TWO, "samplers.gpus=1", "learners.gpus=1")
    _, expected = driver.train(apart)
    assert together["weights_sha256"] == expected["weights_sha256"]
    assert seen[0] == seen[1] and seen[0][0] == seen[0][1] and len(set(seen[0][0])) == 2
