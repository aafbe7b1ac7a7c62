"""A signal to the whole process group of a run with a private Ray: from `timeout`, a scheduler, a closed terminal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowbp_ray import driver
from flowbp_ray.config import loading
from flowbp_ray.run.folder import Run
from tests.driver.test_exact_restart import family, gone, lines_of, start
from tests.small import local_digest, small_overrides

pytestmark = [pytest.mark.ray, pytest.mark.long]


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


def test_sigterm_while_ray_starts_finishes_the_first_step_and_saves(tmp_path: Path) -> None:
    """Ray, which starts, would answer it by ending this process."""
    command = [sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *small_overrides(tmp_path)]
    process = subprocess.Popen(
        [*command, "name=mine", "steps=8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not any(p.name() == "gcs_server" for p in family(process)):
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130 and "stopped after step 1, saved in" in output, output
    assert Run.open(tmp_path / "mine").checkpoints.steps() == [1]
    assert not [p for p in psutil.process_iter(["cmdline"]) if f"_{process.pid}/" in " ".join(p.info["cmdline"] or [])]


@pytest.mark.skipif(not shutil.which("timeout"), reason="GNU timeout is not installed")
def test_timeout_sends_its_signal_twice_and_means_it_once(tmp_path: Path) -> None:
    """To the process, and to the group that it is in."""
    command = ["timeout", "600", sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse"]
    process = subprocess.Popen(
        [*command, *small_overrides(tmp_path), "name=mine", "steps=40"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 240
    while lines_of(tmp_path / "mine") < 2:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.1)
    others = family(process)
    process.send_signal(signal.SIGTERM)  # as if the time were over: `timeout` passes it on as it would its own
    output, _ = process.communicate(timeout=120)
    done = len(Run.open(tmp_path / "mine").metrics())
    assert f"stopped after step {done}, saved in" in output and gone(others), output
    assert Run.open(tmp_path / "mine").checkpoints.steps() == [done] and done < 40
