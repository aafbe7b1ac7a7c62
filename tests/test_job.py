"""`ray job submit` against a running cluster with token authentication: the same command, the same result."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbp_ray.run import Run
from tests.small import small_overrides

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(token: Path) -> dict[str, str]:
    """PATH with this interpreter first, and the token that every node and client needs."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return own | {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Dashboard address and token of a `ray start --head` of our own, ended with everything it started."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    dashboard, folder = free_port(), Path(tempfile.mkdtemp(prefix="fb"))  # short: Ray puts sockets below it
    command = [BIN / "ray", "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=4"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--temp-dir={folder}", "--disable-usage-stats"]
    # Ports of its own: another Ray on this machine (the other tests' own) has the agent's usual one, 52365.
    command += ["--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment(token), stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", head, tmp_path / "head.log")
        yield f"http://127.0.0.1:{dashboard}", token
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard answers, with or without asking for a token."""
    for _ in range(240):
        assert head.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no dashboard at {url}: {log.read_text()}")


def submit(address: str, token: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
    command += ["python", "-m", "flowbp_ray", *arguments]
    for _ in range(30):
        done = subprocess.run(command, cwd=ROOT, env=environment(token), capture_output=True, text=True, timeout=280)
        if "No available agent to submit job" not in done.stderr:
            break
        time.sleep(1)  # the dashboard answers before the node's agent is there
    return done


def test_a_submitted_job_trains(cluster: tuple[str, Path], tmp_path: Path) -> None:
    address, token = cluster
    done = submit(address, token, "train", "shapes_flowbp_sparse", *small_overrides(tmp_path), "name=job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout and "succeeded" in done.stdout + done.stderr
    run = Run.open(tmp_path / "job")
    assert [line["step"] for line in run.metrics()] == [0, 1] and run.checkpoints.steps() == [2]
    refused = submit(address, token, "train", "shapes_flowbp_sparse", "method.k=99")
    assert refused.returncode != 0 and "active steps k must be in [1, 16], got 99" in refused.stdout
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    stranger = submit(address, wrong, "methods")
    assert stranger.returncode != 0 and "flowbp_sparse" not in stranger.stdout
