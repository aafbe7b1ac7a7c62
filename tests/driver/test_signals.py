"""A signal to the whole process group of a run with a private Ray: from `timeout`, a scheduler, a closed terminal."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowbp_ray import driver
from flowbp_ray.config import loading
from flowbp_ray.run.folder import Run
from tests.driver.test_exact_restart import family, gone, start
from tests.small import local_digest, small_overrides


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_reaches_the_driver_alone_which_saves(
    local_ray: Any, tmp_path: Path, number: signal.Signals
) -> None:
    """Ray's processes are in sessions of their own; they live until the step is saved, and not after the driver."""
    settings = ["steps=8", "name=mine", "resume=auto", "learners.ema.decay=0.9"]
    process, folder = start(tmp_path, *settings)
    others = family(process)
    daemons = [p for p in others if p.ppid() == process.pid and p.name() in ("gcs_server", "raylet")]
    assert len(daemons) == 2 and all(os.getsid(p.pid) != process.pid for p in others if psutil.pid_exists(p.pid))
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert gone(others)
    done = len(Run.open(folder).metrics())
    assert Run.open(folder).checkpoints.steps() == [done] and 2 <= done < 8
    assert not (folder / "driver.json").exists()
    config = loading.load("shapes_flowbp_sparse", [*small_overrides(tmp_path), *settings])
    run, summary = driver.train(config)
    assert run.folder == folder and [line["step"] for line in run.metrics()] == list(range(8))
    assert summary["weights_sha256"] == local_digest(config)
