"""A run on three hosts in network namespaces, which can lose their power and their network."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.private_ray import PRIVATE
from tests import clients
from tests.deploy.hosts import Host, network
from tests.deploy.test_multihost import CPUS, Cluster
from tests.paths import ROOT

SPREAD = ["learners.cpus=2.25", "samplers.cpus=1.25", "rewards.cpus=0.25"]
"""On hosts with 4, 4 and 2 CPUs: none has room for two learners, the last one for none."""


TOLD = 10.0  # seconds within which a raylet learns that it was given up, and ends


class Hosts(Cluster):
    """The cluster of the multi-host tests, with a network that can be cut."""

    def enter(self) -> list[str]:
        """What to put before a command, so that it runs on the first host."""
        first = self.network.hosts[0].process
        assert first is not None
        [inside] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        return ["nsenter", "--target", inside, "--mount", "--uts", "--net", "--pid", f"--wd={ROOT}"]

    def cut(self, host: Host) -> None:
        self._link(host, "down")

    def mend(self) -> None:
        """The network is whole, and hosts whose Ray has ended or was given up by the others start it anew."""
        for host in self.network.hosts[1:]:
            self._link(host, "up")
        time.sleep(TOLD)
        alive = {node["node_ip"] for node in self.list("nodes") if node["state"] == "ALIVE"}
        for host in self.network.hosts[1:]:
            if host.process is None or host.process.poll() is not None or host.address not in alive:
                host.kill()
        self.up()

    def _link(self, host: Host, state: str) -> None:
        outside = self.network.namespaces[0]
        subprocess.run(["ip", "-n", outside, "link", "set", host.name, state], check=True, capture_output=True)


@contextmanager
def cluster(folder: Path, wanted: bool) -> Iterator[Hosts | None]:
    """Three hosts with a Ray, where they are wanted; taken away at the end."""
    if not wanted:
        yield None
        return
    folder.mkdir(parents=True)
    env = clients.environment(clients.new_token(folder / "token")) | PRIVATE
    env |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["RAY_worker_niceness"] = "0"
    with network(folder / "hosts", list(CPUS)) as made:
        head = made.hosts[0].address
        hosts = Hosts(made, env | {"RAY_API_SERVER_ADDRESS": f"http://{head}:8265"})
        hosts.up()
        yield hosts
