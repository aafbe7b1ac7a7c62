"""The loop on Ray with every role on the stand-in, colocated on one GPU and resumed; and which GPU an actor takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.process import prepare
from flowbp_ray import driver
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils import accelerator
from tests.gpu import standin
from tests.gpu.standin import build
from tests.paths import ROOT
from tests.small import local_digest, small_config

pytestmark = [pytest.mark.gpu, pytest.mark.ray]

ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture(scope="module")
def gpus() -> Iterator[Any]:
    """A private Ray whose node has two GPUs; its worker processes compute on the stand-in."""
    import ray

    from actors.cluster import start_ray

    if why := build.missing():
        pytest.skip(why)
    build.load()
    environment = {"PYTHONPATH": str(ROOT), build.PLACE: str(build.CACHE)}
    hook = {"worker_process_setup_hook": "tests.gpu.standin.install", "env_vars": environment}
    start_ray("local", num_cpus=4, num_gpus=2, runtime_env=hook)
    yield ray
    ray.shutdown()


def test_a_colocated_run_and_its_resumption(gpus: Any, tmp_path: Path) -> None:
    """Bit for bit the run of one process on the stand-in: in one go, and again from the first step's checkpoint."""
    overrides = ["backbone.num_steps=4", "method.k=2", "name=run", "learners.ema={decay: 0.9}", "checkpoint.every=1"]
    placed = ["encoder.gpus=1", "cluster.colocate=true"]
    evaluated = ["evaluation.prompts=${data.prompts}", "evaluation.limit=2", "evaluation.batch=2"]
    config = small_config(tmp_path, "flowbp_bridge", *overrides, *placed, *evaluated)
    roles = (config.encoder, config.samplers, config.rewards, config.learners)
    assert {role.device for role in roles} == {standin.KIND}
    run, summary = driver.train(config)
    expected = local_digest(config)
    assert summary["weights_sha256"] == expected
    first, second = (line for line in run.metrics() if line["kind"] == "train")
    shutil.rmtree(run.checkpoints.path(2))
    again, resumed = driver.train(config.model_copy(update={"resume": "auto"}))
    assert again.folder == run.folder and resumed["weights_sha256"] == expected
    kept, repeated = (line for line in again.metrics() if line["kind"] == "train")
    assert kept == first and repeated["grad_norm"] == second["grad_norm"]  # its times too: only the second is repeated


class Placed:
    """An actor's process as `prepare` sets it up."""

    def __init__(self, config: RunConfig) -> None:
        prepare(config, 1)

    def device(self) -> int:
        return accelerator.current()


def test_two_actors_that_see_both_gpus_take_one_each(gpus: Any, tmp_path: Path) -> None:
    """Where Ray is told to leave CUDA_VISIBLE_DEVICES alone; where it narrows it, each sees its own as number 0."""
    config = small_config(tmp_path)
    placed: Any = gpus.remote(num_gpus=1, num_cpus=0)(Placed)
    for environment, expected in ((ALL_GPUS, [0, 1]), ({}, [0, 0])):
        actors = [placed.options(runtime_env={"env_vars": environment}).remote(config) for _ in range(2)]
        assert sorted(gpus.get([actor.device.remote() for actor in actors])) == expected
        for actor in actors:
            gpus.kill(actor)
