"""deploy/slurm.sh with a real Ray of two nodes on this machine; only srun and scontrol are stand-ins."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flowbp_ray.run.folder import Run
from tests.paths import ROOT
from tests.small import local_digest, small_config, small_overrides

STANDINS = {
    "scontrol": "printf '%s\\n' n1 n2",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": f"[[ $1 == --all-ip-addresses ]] && exec {shutil.which('hostname')} $1; echo 127.0.1.1",
}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_on_two_nodes(tmp_path: Path) -> None:
    commands, job = tmp_path / "bin", random.randrange(100_000, 900_000)
    commands.mkdir()
    for name, body in STANDINS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "FLOWBP_RAY_START": "--dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0",
    }
    settings = ["name=slurm", "samplers.count=2", "samplers.cpus=1.5"]  # no node has room for both
    command = ["bash", ROOT / "deploy" / "slurm.sh", "shapes_flowbp_sparse", *small_overrides(tmp_path), *settings]
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        digest = json.loads((tmp_path / "slurm" / "summary.json").read_text())["weights_sha256"]
        assert Run.open(tmp_path / "slurm").checkpoints.steps() == [2]
        assert digest == local_digest(small_config(tmp_path, "flowbp_sparse"))
        left = [
            p.pid for p in psutil.process_iter(["cmdline"]) if f"/tmp/ray-{job}/" in " ".join(p.info["cmdline"] or [])
        ]
        assert not left and not list(tmp_path.glob(".flowbp_ray-*"))
    finally:
        shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
