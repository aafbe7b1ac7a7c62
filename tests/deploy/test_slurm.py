"""deploy/slurm.sh with a real Ray on this machine; only srun and scontrol are stand-ins."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from flowbp_ray.run.folder import Run
from tests.driver.test_exact_restart import gone, lines_of
from tests.paths import ROOT
from tests.small import local_digest, small_config, small_overrides

pytestmark = [pytest.mark.ray, pytest.mark.long]


class Allocation:
    """What Slurm gives a job: its nodes, its environment, and what was asked of `scontrol requeue`."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder, self.job = folder, random.randrange(100_000, 900_000)
        self.requeued = folder / "requeued"
        commands = folder / "bin"
        commands.mkdir()
        names, hosts = " ".join(nodes), shutil.which("hostname")
        for name, body in {
            "scontrol": f'if [[ $1 == requeue ]]; then echo "$2" >>{self.requeued}; else printf "%s\\n" {names}; fi',
            "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
            "hostname": f"[[ $1 == --all-ip-addresses ]] && exec {hosts} $1; echo 127.0.1.1",
        }.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (commands / name).chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NODELIST": f"n[1-{len(nodes)}]",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURM_SUBMIT_DIR": str(folder),
            "FLOWBP_RAY_START": "--dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0",
        }

    def batch(self, *settings: str) -> subprocess.Popen[str]:
        """The batch script as slurmstepd starts it, in a session of its own."""
        command = ["bash", ROOT / "deploy" / "slurm.sh", "shapes_flowbp_sparse", *small_overrides(self.folder)]
        return subprocess.Popen(
            [*command, "name=slurm", *settings],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def left(self) -> list[int]:
        """The processes of this job's Ray."""
        mark = f"/tmp/ray-{self.job}/"
        return [p.pid for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or [])]

    def nothing_is_left(self) -> bool:
        return not self.left() and not list(self.folder.glob(".flowbp_ray-*"))


@pytest.fixture
def allocation(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Allocation]:
    """Of one node, or of those that the test's parameter names."""
    made = Allocation(tmp_path, getattr(request, "param", ["n1"]))
    yield made
    shutil.rmtree(f"/tmp/ray-{made.job}", ignore_errors=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("allocation", [["n1", "n2"]], indirect=True)
def test_a_run_on_two_nodes(allocation: Allocation, tmp_path: Path) -> None:
    process = allocation.batch("samplers.count=2", "samplers.cpus=1.5")  # no node has room for both
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    digest = json.loads((tmp_path / "slurm" / "summary.json").read_text())["weights_sha256"]
    assert Run.open(tmp_path / "slurm").checkpoints.steps() == [2]
    assert digest == local_digest(small_config(tmp_path, "flowbp_sparse"))
    assert allocation.nothing_is_left()


def at_work(process: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """Everything that the script has started, once two steps more are logged."""
    before, until = lines_of(folder), time.monotonic() + 400
    while lines_of(folder) < before + 2:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.1)
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "scancel --batch --signal=TERM"]
)
def test_asked_once_it_saves_and_leaves_nothing(allocation: Allocation, tmp_path: Path, number: signal.Signals) -> None:
    """Slurm signals the script alone (#SBATCH --signal=B:USR1@300). Ahead of the limit the job is queued again.

    What is started again goes on, to the weights of a run that was never stopped.
    """
    process = allocation.batch("steps=12")
    others = at_work(process, tmp_path / "slurm")
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert len(others) >= 6 and gone(others) and allocation.nothing_is_left()
    [done] = Run.open(tmp_path / "slurm").checkpoints.steps()
    assert f"stopped after step {done}, saved in" in output and 2 <= done < 12
    limit = number == signal.SIGUSR1
    assert allocation.requeued.is_file() == limit
    if limit:
        assert allocation.requeued.read_text().split() == [str(allocation.job)]
        again = allocation.batch("steps=12")
        output, _ = again.communicate(timeout=600)
        assert again.returncode == 0 and f"going on from the checkpoint of step {done}" in output, output
        digest = json.loads((tmp_path / "slurm" / "summary.json").read_text())["weights_sha256"]
        assert digest == local_digest(small_config(tmp_path, "flowbp_sparse", "steps=12"))
        assert allocation.nothing_is_left()


@pytest.mark.timeout(900)
def test_asked_twice_it_stops_at_once(allocation: Allocation, tmp_path: Path) -> None:
    process = allocation.batch("steps=40", "data.prompts_per_step=96")  # steps of many seconds
    others = at_work(process, tmp_path / "slurm")
    process.send_signal(signal.SIGTERM)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped at once" in output and "Traceback" not in output, output
    assert gone(others) and allocation.nothing_is_left()
    assert not Run.open(tmp_path / "slurm").checkpoints.steps() and not allocation.requeued.exists()
