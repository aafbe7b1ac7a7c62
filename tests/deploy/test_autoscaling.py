"""Ray's own autoscaler adds a node for a sampler that has no room, and takes it back when the sampler has left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.clients import BIN, environment, new_token
from tests.deploy.autoscaled import settings
from tests.deploy.test_job import ROOT, free_port, started
from tests.small import local_digest, small_config

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]


def description(gcs: str) -> dict[str, object]:
    """Nodes are processes on this machine; `fake_multinode` is Ray's provider for that."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "samplers": {"resources": {"CPU": 1, "sampler": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    }
    return {
        "cluster_name": "autoscaled",
        "max_workers": 3,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "worker_liveness_check": False,
        },
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        **{key: [] for key in ("cluster_synced_files", "initialization_commands", "setup_commands")},
        **{f"{node}_{what}": [] for node in ("head", "worker") for what in ("setup_commands", "start_ray_commands")},
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a driver for a cluster of a head and, for now, nothing else."""
    token, port = new_token(tmp_path / "token"), free_port()
    gcs, folder = f"{ray.util.get_node_ip_address()}:{port}", Path(tempfile.mkdtemp(prefix="fb"))
    (tmp_path / "cluster.yaml").write_text(json.dumps(description(gcs)))
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}"]
    command += [f"--autoscaling-config={tmp_path / 'cluster.yaml'}", "--num-cpus=1", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", "--dashboard-agent-listen-port=0", "--include-dashboard=false"]
    env = environment(token) | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        assert started(head, tmp_path / "head.log"), (tmp_path / "head.log").read_text()
        yield environment(token) | {"RAY_ADDRESS": gcs}
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_the_cluster_grows_and_shrinks_with_the_pool(growing: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.deploy.autoscaled", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=growing, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["nodes"] == [1, 2, 1]
    assert found["counts"] == [1, 1, 2, 2, 2, 1, 1, 1]
    assert found["digest"] == local_digest(small_config(tmp_path, "flowbp_sparse", *settings(tmp_path)))
