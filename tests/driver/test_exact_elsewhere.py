"""A run that moves: two ranks of ZeRO-2, one process of plain torch, two ranks again; a damaged checkpoint between."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowbp_ray import driver
from flowbp_ray.driver import Loop
from tests.driver.chaos import before_step
from tests.small import small_config

pytestmark = [pytest.mark.ray, pytest.mark.long]


class Crash(Exception):
    """Stands for whatever ends a driver without warning."""


def crash(_: Loop) -> None:
    raise Crash


def whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_a_run_that_moves_is_the_run_that_stays(local_ray: Any, tmp_path: Path) -> None:
    """Weights and average within 1e-6 after six steps, each of which moved them by far more."""
    shared = ["steps=6", "checkpoint.every=1", "staleness=1", "learners.ema.decay=0.9", "learners.optimizer.lr=1e-3"]
    two = ["learners.engine=deepspeed", "learners.count=2", "learners.zero=2", "learners.micro_batch=1"]
    one = ["learners.engine=torch", "learners.count=1", "learners.micro_batch=4"]

    def config(name: str, *where: str) -> Any:
        return small_config(tmp_path, "flowbp_bridge", *shared, f"name={name}", "resume=auto", *where)

    for stop, where in ((2, two), (5, one)):
        with before_step(stop, crash), pytest.raises(Crash):
            driver.train(config("moves", *where))
    damaged = tmp_path / "moves" / "checkpoints" / "step_000005" / "engine" / "rank_0000.safetensors"
    os.truncate(damaged, damaged.stat().st_size - 1)
    moves, _ = driver.train(config("moves", *two))
    stays, _ = driver.train(config("stays", *two))
    for average in (False, True):
        got, want = (whole(run.checkpoints.weights(6, average)[1]) for run in (moves, stays))
        start = whole(stays.checkpoints.weights(5, average)[1])
        assert float((got - want).norm()) <= 1e-6 * float(want.norm())
        assert float((start - want).norm()) > 1e-4 * float(want.norm())
    assert [line["step"] for line in moves.metrics() if line["kind"] == "train"] == list(range(6))
    log = (moves.folder / "log.txt").read_text()
    assert "from step 2 on sums round differently: learners.count was 2, is 1" in log
    assert "step 5 is damaged (engine/rank_0000.safetensors is not what was written); set aside" in log
    assert "from step 4 on sums round differently: learners.count was 1, is 2" in log
    assert "round differently" not in (stays.folder / "log.txt").read_text()
