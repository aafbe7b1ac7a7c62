"""A cluster of three hosts: a submitted job trains on all of them with the bits of a run on one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.private_ray import PRIVATE
from flowbp_ray.run.folder import Run
from tests import clients
from tests.deploy.hosts import Network, missing, network
from tests.paths import ROOT
from tests.small import WAITED, small_overrides

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.hosts, pytest.mark.timeout(900)]

CPUS = {"host1": 4, "host2": 4, "host3": 2}
SPREAD = ["learners.cpus=2.25", "samplers.cpus=1.25", "rewards.cpus=0.25"]
"""No host has room for two learners, host3 for none, none for two samplers beside what else it must hold."""
STEPS = 4
SETTINGS = [
    f"steps={STEPS}",
    "data.rollout_batch=1",  # four items: each of three samplers has one
    "samplers.count=3",
    "learners.engine=deepspeed",
    "learners.count=2",
    "learners.zero=2",
]


@dataclass(frozen=True)
class Cluster:
    """Hosts with a Ray, and how to talk to it from a machine that is no part of it."""

    network: Network
    env: dict[str, str]

    def up(self) -> None:
        """`ray start` on hosts that are off, as docs/cluster.md has it for clusters by hand."""
        start = [clients.BIN / "ray", "start", "--block", "--disable-usage-stats", "--object-store-memory=250000000"]
        head = self.network.hosts[0]
        off = [host for host in self.network.hosts if host.process is None]
        for host in off:
            role = ["--head", "--dashboard-host=0.0.0.0"] if host is head else [f"--address={head.address}:6379"]
            host.start([*start, *role, f"--num-cpus={CPUS[host.name]}"], self.env)
            if host is head:
                assert host.says("Ray runtime started"), host.log.read_text()
        for host in off:
            assert host.says("Ray runtime started"), host.log.read_text()

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's, from the repository's root."""
        command = self.network.outside(clients.BIN / "ray", *arguments)
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True)

    def submit(self, *options: str, train: list[str]) -> subprocess.CompletedProcess[str]:
        command = ("python", "-m", "flowbp_ray", "train", "configs/runs/shapes_flowbp_sparse.yaml", *train)
        own = ("--working-dir", ".", "--runtime-env", "deploy/job.yaml", *options)
        return clients.accepted(lambda: self.ray("job", "submit", *own, "--", *command))

    @contextmanager
    def followed(self, job: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A process that writes what the job prints to `log`, and ends with the job."""
        command = self.network.outside(clients.BIN / "ray", "job", "logs", "--follow", job)
        with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=file, stderr=file) as ray:
            try:
                yield ray
            finally:
                ray.kill()

    def list(self, what: str) -> list[dict[str, Any]]:
        """What Ray itself says: its nodes or actors, also those that have ended."""
        where = ("--address", self.env["RAY_API_SERVER_ADDRESS"])
        done = self.ray("list", what, *where, "--format", "json", "--limit", "1000")
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    def where(self) -> dict[str, list[str]]:
        """The hosts of all actors that the newest run had, by class."""
        names = {host.address: host.name for host in self.network.hosts}
        nodes = {node["node_id"]: names[node["node_ip"]] for node in self.list("nodes")}
        actors = self.list("actors")
        newest = max(actor["job_id"] for actor in actors if actor["class_name"] == "LearnerActor")
        found: dict[str, list[str]] = {}
        for actor in actors:
            if actor["job_id"] == newest:
                found.setdefault(actor["class_name"], []).append(nodes[actor["node_id"]])
        return found


@pytest.fixture(scope="module")
def possible() -> None:
    """Skips what follows where there can be no hosts, and says why."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def one_host(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run by a driver with a private Ray."""
    folder = tmp_path_factory.mktemp("one_host")
    env = {k: v for k, v in clients.environment(folder).items() if not k.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *small_overrides(folder)]
    done = subprocess.run([*command, *SETTINGS, "name=one"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run.open(folder / "one")


@pytest.fixture(scope="module")
def hosts(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Off."""
    folder = tmp_path_factory.mktemp("cluster")
    env = clients.environment(clients.new_token(folder / "token")) | PRIVATE
    env |= {"RAY_health_check_period_ms": "1000"}  # a host's end is seen after 5 s and not 16
    with network(folder / "hosts", list(CPUS)) as made:
        yield Cluster(made, env | {"RAY_API_SERVER_ADDRESS": f"http://{made.hosts[0].address}:8265"})


@pytest.fixture
def cluster(one_host: Run, hosts: Cluster) -> Cluster:
    """All three are up; after the run on one host, so that there is one Ray at a time."""
    hosts.up()
    return hosts


def digest(run: Run) -> str:
    return str(json.loads((run.folder / "summary.json").read_text())["weights_sha256"])


def numbers(run: Run, *without: str) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl but for times: losses, rewards, gradient norms, bytes, ..., digit by digit."""
    return [
        {k: v for k, v in line.items() if not (k.endswith("_s") or k.startswith(WAITED) or k in without)}
        for line in run.metrics()
    ]


def weight_bytes(run: Run) -> list[float]:
    """How often the samplers together loaded each version."""
    size = sum(tensor.nbytes for tensor in run.checkpoints.weights()[1].values())
    return [line["weight_bytes"] / size for line in run.metrics()]


def logged(run: Run) -> dict[str, set[str]]:
    """The hosts of each role, as log.txt has them."""
    [line] = [line for line in (run.folder / "log.txt").read_text().splitlines() if " INFO learners on " in line]
    parts = (part.split(" on ") for part in line.partition(" INFO ")[2].split("; "))
    return {role: set(hosts.split(", ")) for role, hosts in parts}


def test_three_hosts_train_like_one(one_host: Run, cluster: Cluster, tmp_path: Path) -> None:
    """ZeRO-2 over two hosts and samplers on three: the same weights, losses, rewards and gradient norms to the bit."""
    done = cluster.submit(train=[*small_overrides(tmp_path), *SETTINGS, *SPREAD, "name=three"])
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run.open(tmp_path / "three")
    where = cluster.where()
    assert sorted(where["LearnerActor"]) == ["host1", "host2"]
    assert sorted(where["SamplerActor"]) == ["host1", "host2", "host3"]
    roles = {"learners": "LearnerActor", "samplers": "SamplerActor", "reward servers": "RewardActor"}
    assert logged(run) == {role: set(where[name]) for role, name in roles.items()}
    assert weight_bytes(run) == [3] * STEPS  # every sampler was at work in every step
    assert digest(run) == digest(one_host)
    parts = "embedding_bytes"  # prompts travel in parts, which are cut by the encoder's speed
    assert numbers(run, parts) == numbers(one_host, parts)


@pytest.mark.long
def test_a_host_is_lost(one_host: Run, cluster: Cluster, tmp_path: Path) -> None:
    """The power of a host with a sampler fails after the first step: the others go on, to the same weights."""
    options = ("--no-wait", "--submission-id", "lost")
    done = cluster.submit(*options, train=[*small_overrides(tmp_path), *SETTINGS, *SPREAD, "name=lost"])
    assert done.returncode == 0, done.stdout + done.stderr
    lines, log = tmp_path / "lost" / "metrics.jsonl", tmp_path / "job.log"
    with cluster.followed("lost", log) as job:
        while not (lines.is_file() and lines.read_text()):
            assert job.poll() is None, log.read_text()
            time.sleep(0.1)
        cluster.network.hosts[2].kill()
        before = len(lines.read_text().splitlines())
        job.wait()
    assert (tmp_path / "lost" / "summary.json").is_file(), log.read_text()
    run = Run.open(tmp_path / "lost")
    assert before < STEPS - 1 and logged(run)["samplers"] == set(CPUS)
    lost = cluster.network.hosts[2].address
    assert {node["state"] for node in cluster.list("nodes") if node["node_ip"] == lost} == {"DEAD"}
    assert (weight_bytes(run)[0], weight_bytes(run)[-1]) == (3, 2)
    assert digest(run) == digest(one_host)
    other = ("retries", "incarnation", "weight_bytes", "embedding_bytes", "embedding_bytes_per_image")
    assert numbers(run, *other) == numbers(one_host, *other)
