"""From outside into a running cluster with token authentication: `ray job submit`, stop, resume; joining by address."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from flowbp_ray.rewards.shapes_clip import WEIGHTS
from flowbp_ray.run.folder import Run
from flowbp_ray.shapes import model_dir
from tests import clients
from tests.driver.test_exact_restart import gone
from tests.paths import ROOT
from tests.small import local_digest, small_config, small_overrides

pytestmark = pytest.mark.ray
ACTORS = tuple(f"ray::{role}Actor" for role in ("Sampler", "Reward", "Learner", "Encoder", "Reader"))


class Cluster(NamedTuple):
    """A `ray start --head` of our own: where jobs go, where drivers join, the file of its token, its process."""

    dashboard: str
    gcs: str
    token: Path
    head: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(token: Path) -> dict[str, str]:
    """With this tree's code, also where a driver joins from another folder."""
    return clients.environment(token) | {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}  # not below other work


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Ended with everything it started."""
    token = clients.new_token(tmp_path / "token")
    for _ in range(3):  # a start fails where the machine is so loaded that it takes 30 s
        dashboard, port, folder = free_port(), free_port(), Path(tempfile.mkdtemp(prefix="fb"))  # short, for sockets
        command = [
            clients.BIN / "ray",
            "start",
            "--head",
            "--block",
            f"--port={port}",
            "--num-cpus=4",
            "--disable-usage-stats",
        ]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        # Ports of its own: another Ray on this machine (the other tests' own) has the agent's usual one, 52365.
        command += [f"--temp-dir={folder}", "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"]
        with (tmp_path / "head.log").open("w") as log:
            head = subprocess.Popen(command, env=environment(token), stdout=log, stderr=log, start_new_session=True)
        try:
            if started(head, tmp_path / "head.log"):
                yield Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", token, head.pid)
                return
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)
            shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError((tmp_path / "head.log").read_text())


def started(head: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until the head says that it is up; False where it ends instead."""
    while head.poll() is None:
        if "Ray runtime started" in log.read_text():
            return True
        time.sleep(0.5)
    return False


def of_runs(cluster: Cluster) -> list[psutil.Process]:
    """The drivers and the actors of all runs on the cluster."""
    found = []
    for process in psutil.Process(cluster.head).children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "-m flowbp_ray train" in command or command.startswith(ACTORS):
                found.append(process)
    return found


def ray(cluster: Cluster, *arguments: str, token: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`ray job …` at the cluster, from the repository's root."""
    verb, *rest = arguments
    command = [clients.BIN / "ray", "job", verb, "--address", cluster.dashboard, *rest]
    env = environment(token or cluster.token)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


def submit(
    cluster: Cluster, *arguments: str, options: tuple[str, ...] = (), token: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The README's one command."""
    own = ("--working-dir", ".", *options, "--", "python", "-m", "flowbp_ray", *arguments)
    return clients.accepted(lambda: ray(cluster, "submit", *own, token=token))


def join(cluster: Cluster, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A driver in `folder` that joins the cluster by its address."""
    command = [sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *arguments]
    env = environment(cluster.token) | {"RAY_ADDRESS": cluster.gcs} | env
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.long  # `make test-hosts` submits one too
def test_a_submitted_job_trains(cluster: Cluster, tmp_path: Path) -> None:
    done = submit(cluster, "train", "configs/runs/shapes_flowbp_sparse.yaml", *small_overrides(tmp_path), "name=job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout and "succeeded" in done.stdout + done.stderr
    assert "`ray job stop` will kill this run after 3 s" in done.stdout
    run = Run.open(tmp_path / "job")
    assert [line["step"] for line in run.metrics()] == [0, 1] and run.checkpoints.steps() == [2]
    refused = submit(cluster, "train", "shapes_flowbp_sparse", "method.k=99")
    assert refused.returncode != 0 and "active steps k must be in [1, 16], got 99" in refused.stdout
    wrong = clients.new_token(tmp_path / "wrong")
    stranger = submit(cluster, "methods", token=wrong)
    assert stranger.returncode != 0 and "flowbp_sparse" not in stranger.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_is_stopped_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """`ray job stop` lets the step finish and saves; the same command with resume=auto ends with the same weights."""
    settings = ["steps=16", "name=stopped", "resume=auto"]
    command = ["train", "configs/runs/shapes_flowbp_sparse.yaml", *small_overrides(tmp_path), *settings]
    waits = ("--runtime-env", "deploy/job.yaml")
    done = submit(cluster, *command, options=(*waits, "--no-wait", "--submission-id", "first"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = tmp_path / "stopped" / "metrics.jsonl"
    for _ in range(480):
        if lines.is_file() and lines.read_text():
            break
        time.sleep(0.25)
    at_work = of_runs(cluster)
    stopped = ray(cluster, "stop", "first")
    log = ray(cluster, "logs", "first").stdout
    assert stopped.returncode == 0 and "Job 'first' was stopped" in stopped.stdout, log
    assert "finishing the step and saving" in log and "name=stopped resume=auto goes on from there" in log
    assert "will kill this run" not in log
    [saved] = Run.open(tmp_path / "stopped").checkpoints.steps()
    assert 1 <= saved < 16
    assert len(at_work) >= 4 and gone(at_work) and not of_runs(cluster)
    again = submit(cluster, *command, options=waits)
    assert again.returncode == 0 and f"going on from the checkpoint of step {saved}" in again.stdout, again.stdout
    run = Run.open(tmp_path / "stopped")
    assert [line["step"] for line in run.metrics()] == list(range(16))
    config = small_config(tmp_path, "flowbp_sparse", *settings)
    assert json.loads((run.folder / "summary.json").read_text())["weights_sha256"] == local_digest(config)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_driver_that_joins_by_address(cluster: Cluster, tmp_path: Path) -> None:
    """Relative paths mean the driver's folder; who is refused gets one line, and no run's folder is left."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copytree(model_dir(), folder / "model")
    shutil.copytree(WEIGHTS / "shapes_clip", folder / "reward")
    shutil.copy(ROOT / "tests" / "data" / "few_prompts.txt", folder)
    settings = [*small_overrides(tmp_path), "output=runs", "steps=1", "data.prompts=few_prompts.txt"]
    relative = [*settings, "backbone.path=model", "rewards.terms[0].options={folder: reward}"]
    done = join(cluster, folder, *relative, "name=relative")
    assert done.returncode == 0, done.stdout + done.stderr
    digest = json.loads((folder / "runs" / "relative" / "summary.json").read_text())["weights_sha256"]
    assert digest == local_digest(small_config(tmp_path, "flowbp_sparse", "steps=1"))
    wrong = clients.new_token(tmp_path / "wrong")
    refusals = {
        "refuses this user's token": {"RAY_AUTH_TOKEN_PATH": str(wrong)},
        "(Connection refused)": {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"},
        "is no address of a cluster to join": {"RAY_ADDRESS": cluster.dashboard},
    }
    for line, env in refusals.items():
        refused = join(cluster, folder, *settings, "name=refused", **env)
        assert refused.returncode == 2 and line in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert [path.name for path in (folder / "runs").iterdir()] == ["relative"]
    lost = submit(cluster, "train", "shapes_flowbp_sparse", *small_overrides(tmp_path), "output=runs", "name=lost")
    assert lost.returncode != 0 and "output=runs is inside the job's working directory" in lost.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_suite_of_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """`compare --address`: the runs are jobs, two at a time; the same command again runs nothing."""
    shared = [*small_overrides(tmp_path), "steps=1", "evaluation.prompts=shapes:dev", "evaluation.limit=4"]
    rows = {"Sparse": "shapes_flowbp_sparse", "ReFL": "shapes_refl", "late": "shapes_flowbp_sparse"}
    of_row = {"ReFL": ["method.last=3"], "late": ["method.late_bias=4"]}
    plain = {name: {"config": config, "overrides": of_row.get(name, [])} for name, config in rows.items()}
    suite = {"name": "jobs", "seeds": [1], "overrides": shared, "rows": plain, "columns": ["verifier", "shapes_clip"]}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    command = [sys.executable, "-m", "flowbp_ray", "compare", "suite.yaml", "--out", "out", "--at-once", "2"]
    command += ["--address", cluster.dashboard]

    def compare() -> str:
        env = environment(cluster.token)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = compare()
    jobs = ray(cluster, "list").stdout
    assert jobs.count("JobStatus.SUCCEEDED") == 3, jobs
    folder = tmp_path / "out" / "jobs"
    assert "3 of 3" in said and "| late |" in (folder / "table.md").read_text()
    assert len(list((folder / "base").rglob("guidance_1.0.npz"))) == 1
    summary = json.loads((folder / "Sparse_seed1" / "summary.json").read_text())
    config = small_config(tmp_path, "flowbp_sparse", "steps=1", "seed=1", "plan_seed=1")
    assert summary["weights_sha256"] == local_digest(config)
    assert "3 of 3 runs are done" in compare() and ray(cluster, "list").stdout.count("JobStatus.SUCCEEDED") == 3
