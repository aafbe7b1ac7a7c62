"""The files below deploy/, against the published schemas where those can be had without a network; no Ray is started.

ray up: Ray's own JSON schema and preparation. Pods and volumes: the Kubernetes schemas in kubernetes-validate.
RayCluster and RayJob: tests/data/schemas/kuberay.json, our own list of the fields used, which states its gaps.
slurm.sh: bash -n, shellcheck, and a run with programs in the place of srun, scontrol, ray and python.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from flowbp_ray.config import loading
from tests.paths import ROOT

DEPLOY = ROOT / "deploy"
SCHEMA = json.loads((ROOT / "tests" / "data" / "schemas" / "kuberay.json").read_text())
KUBERNETES = "1.33"
KUBERAY = ["kuberay-raycluster.yaml", "kuberay-rayjob.yaml"]
TOKEN = {"mode": "token", "secretName": "flowbp-ray-token"}


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def cluster_of(manifest: Any) -> Any:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def check_kuberay(manifest: Any) -> None:
    """Our schema, and every pod template as the pod that comes of it. Raises ValidationError."""
    jsonschema.validate(manifest, SCHEMA)
    cluster = cluster_of(manifest)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        mounted = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests(name: str) -> None:
    """Learners fixed, samplers growing, a token from a secret, storage that all pods share, time to save."""
    manifest = read(name)
    check_kuberay(manifest)
    cluster = cluster_of(manifest)
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    ends = {key: (group["minReplicas"], group["maxReplicas"]) for key, group in groups.items()}
    assert ends["learners"] == (1, 1) and ends["rewards"] == (1, 1) and ends["samplers"][0] < ends["samplers"][1]
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == TOKEN
    claim = read("kuberay-storage.yaml")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (cluster["headGroupSpec"], *groups.values()):
        spec = group["template"]["spec"]
        claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
        assert claims == [claim["metadata"]["name"]]
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "600"} in spec["containers"][0]["env"]


def test_the_job_of_the_manifest_is_a_run_that_its_cluster_can_hold() -> None:
    spec = read("kuberay-rayjob.yaml")["spec"]
    words = spec["entrypoint"].split()
    assert words[:4] == ["python", "-m", "flowbp_ray", "train"]
    config = loading.load(words[4], words[5:])
    pools = (config.learners, config.samplers, config.rewards)
    there = 0
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        there += group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert sum(pool.count * pool.gpus for pool in pools) == there == 17
    assert config.resume == "auto" and config.checkpoint.every and spec["backoffLimit"]  # a new cluster goes on
    assert config.output.startswith("/shared") and str(config.backbone.path).startswith("/shared")


def test_the_same_cluster_in_both_manifests() -> None:
    assert cluster_of(read(KUBERAY[0])) == cluster_of(read(KUBERAY[1]))


@pytest.mark.parametrize("what", ["field", "type", "pod", "version"])
def test_the_kuberay_check_sees_mistakes(what: str) -> None:
    manifest = copy.deepcopy(read(KUBERAY[0]))
    group = manifest["spec"]["workerGroupSpecs"][1]
    if what == "field":
        group["maxReplica"] = group.pop("maxReplicas")
    elif what == "type":
        group["rayStartParams"] = {"num-gpus": 1}  # a number, where all are strings
    elif what == "pod":
        group["template"]["spec"]["containers"][0]["volumeMount"] = []
    else:
        manifest["apiVersion"] = "ray.io/v1alpha1"
    with pytest.raises(jsonschema.ValidationError):
        check_kuberay(manifest)


def test_ray_up_accepts_the_cluster_file() -> None:
    """Ray's schema, after its own preparation, which fills in the defaults of the provider."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    raw = read("ray-cluster.yaml")
    ready = prepare_config(copy.deepcopy(raw))
    validate_config(ready)
    [(name, workers)] = ready["available_node_types"].items()
    assert (
        workers["min_workers"] == workers["max_workers"] == ready["max_workers"] == 3
        and name in ready["head_node_type"]
    )
    for commands in (ready["head_start_ray_commands"], ready["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[1] and "RAY_JOB_STOP_WAIT_TIME_S=600" in commands[1]
    assert "~/.ray/auth_token" in raw["file_mounts"]
    raw["idle_timeout"] = raw.pop("file_mounts")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(raw))


def test_the_runtime_env_of_a_job() -> None:
    from ray.runtime_env import RuntimeEnv

    env = RuntimeEnv(**read("job.yaml"), working_dir="gcs://_ray_pkg_0.zip")
    assert env.env_vars() == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert {path.rstrip("/") for path in env["excludes"]} <= {path.name for path in ROOT.iterdir()}


def test_every_package_travels_with_a_job() -> None:
    """All files of the wheel's packages, by Ray's own walk; nothing that is only large or only tests."""
    from ray._private.runtime_env import packaging

    sent: set[str] = set()
    outside = [packaging._get_excludes(ROOT, [*read("job.yaml")["excludes"], ".venv*"])]
    packaging._dir_travel(ROOT, outside, lambda path: sent.add(str(path.relative_to(ROOT))), include_gitignore=True)
    [include] = re.findall(r"^include = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    found = [path for pattern in json.loads(include) for path in ROOT.glob(pattern) if path.is_dir()]
    roots = [path for path in found if path.suffix != ".egg-info"]  # what an installation leaves here
    assert {path.name for path in roots} == {"flowbp_ray", "actors", "configs", "benchmarks"}
    needed = {str(path.relative_to(ROOT)) for root in roots for path in root.rglob("*.py")}
    assert needed and not needed - sent
    assert not {"tests/conftest.py", "docs/cluster.md", ".venv/pyvenv.cfg"} & sent


def test_no_host_or_secret_is_written_down() -> None:
    for path in DEPLOY.iterdir():
        text = path.read_text()
        assert not re.search(r"\b[\w-]+\.(io|com|dev|cloud)/[\w-]+/[\w.-]+:", text), path  # an image with its registry
        assert not re.search(r"\b[0-9a-f]{32,}\b", text), path


FAKES = {
    "scontrol": """[[ $1 == show ]] && printf '%s\\n' n1 n2 n3 || echo "scontrol $*" >>"$RECORD" """,
    "srun": """while [[ $1 == --* ]]; do options+="$1 "; shift; done
echo "srun ${options}$*" >>"$RECORD"; exec "$@" """,
    "hostname": """[[ $1 == --ip-address ]] && echo 127.0.1.1 && exit # as Debian's
echo "${ADDRESSES-fd00::1 127.0.1.1 10.0.0.1 10.9.9.9} " """,
    "ray": """[[ $1 == health-check ]] && exit
echo "token $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c <"$RAY_AUTH_TOKEN_PATH")" >>"$RECORD"
trap 'echo "ended $2" >>"$RECORD"; exit' TERM; while true; do sleep 0.05; done""",
    "python": """echo "RAY_ADDRESS=$RAY_ADDRESS python $*" >>"$RECORD"; trap 'echo saved >>"$RECORD"; exit 130' TERM
[[ $* == *name=waits* ]] || { sleep 1; exit 3; }; while true; do sleep 0.05; done""",
}


def slurm(tmp_path: Path, *arguments: str, **more: str) -> tuple[subprocess.Popen[str], Path]:
    """deploy/slurm.sh as Slurm would start it on the first of three nodes, and what was called."""
    commands, record = tmp_path / "bin", tmp_path / "record"
    commands.mkdir()
    record.touch()
    for name, body in FAKES.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "4"}
    job |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(tmp_path), "RECORD": str(record)}
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", **job, **more}
    command = ["bash", DEPLOY / "slurm.sh", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True), record


def test_slurm_script(tmp_path: Path) -> None:
    """Head on the first node, the others join, the driver's exit code is the job's, nothing is left."""
    process, record = slurm(tmp_path, "my.yaml", "name=x", "cluster.placement_timeout=60")
    assert process.wait(60) == 3, process.communicate()
    lines = record.read_text().splitlines()
    head, rest = "--nodes=1 --ntasks=1 --cpus-per-task=4 --nodelist=n1", "--num-cpus=4 --num-gpus=2"
    assert lines[0] == f"srun {head} hostname --all-ip-addresses"
    assert any(
        line.startswith(f"srun {head} ray start --head --node-ip-address=10.0.0.1 --port=23456 ") for line in lines
    )
    joins = [line for line in lines if "ray start --address=10.0.0.1:23456" in line]
    assert (
        len(joins) == 1 and "--nodes=2 --ntasks=2" in joins[0] and "--nodelist=n2,n3" in joins[0] and rest in joins[0]
    )
    driver = "RAY_ADDRESS=10.0.0.1:23456 python -m flowbp_ray train my.yaml resume=auto cluster.placement_timeout=600 "
    assert driver + "name=x cluster.placement_timeout=60" in lines
    assert [line for line in lines if line.startswith("token")] == ["token 600 64"] * 2
    assert sorted(line for line in lines if line.startswith("ended")) == [
        "ended --address=10.0.0.1:23456",
        "ended --head",
    ]
    assert not list(tmp_path.glob(".flowbp_ray-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_script_saves_and_ends_or_queues_again(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM (scancel --batch) ends the job, SIGUSR1 (before the time limit) queues it again; both after saving."""
    process, record = slurm(tmp_path, "my.yaml", "name=waits")
    for _ in range(600):
        if "name=waits" in record.read_text():
            break
        time.sleep(0.05)
    time.sleep(0.3)  # until the traps are set
    process.send_signal(number)
    assert process.wait(60) == 130, process.communicate()
    lines = record.read_text().splitlines()
    assert lines.count("saved") == 1 and sum(line.startswith("ended") for line in lines) == 2
    assert ("scontrol requeue 123456" in lines) == (number == signal.SIGUSR1)


@pytest.mark.parametrize("addresses", ["", "127.0.0.1 fd00::1"])
def test_slurm_script_names_a_node_without_an_address(tmp_path: Path, addresses: str) -> None:
    process, record = slurm(tmp_path, "my.yaml", ADDRESSES=addresses)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "n1 has no IPv4 address that other nodes reach" in error
    assert error.count("\n") == 1 and "ray start" not in record.read_text()


def test_slurm_script_says_how_to_call_it(tmp_path: Path) -> None:
    process, record = slurm(tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1 and "usage: sbatch" in error
    shutil.rmtree(tmp_path / "bin")
    process, record = slurm(tmp_path, "my.yaml", SLURM_JOB_ID="")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1 and "not in a Slurm job" in error
    assert not record.read_text()


def test_slurm_script_is_sound() -> None:
    script = DEPLOY / "slurm.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [shellcheck if shellcheck.exists() else "shellcheck", script], capture_output=True, text=True, check=False
    )
    assert not found.stdout and found.returncode == 0, found.stdout
