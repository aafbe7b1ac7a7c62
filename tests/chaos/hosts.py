"""A run as a job on three hosts in network namespaces, which can lose their power and their network."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.cluster import PRIVATE
from tests import clients
from tests.chaos.configurations import SPREAD
from tests.chaos.running import OURS, Running
from tests.deploy.hosts import Host, network
from tests.deploy.test_multihost import CPUS, Cluster
from tests.paths import ROOT


class Hosts(Cluster):
    """The cluster of the multi-host tests, with a network that can be cut."""

    def cut(self, host: Host) -> None:
        self._link(host, "down")

    def mend(self) -> None:
        """The network is whole, and hosts whose Ray has ended or was given up by the others start it anew."""
        for host in self.network.hosts[1:]:
            self._link(host, "up")
        lost = [host for host in self.network.hosts[1:] if not self._belongs(host)]
        for host in lost:
            host.kill()
        self.up()

    def _belongs(self, host: Host) -> bool:
        if host.process is None or host.process.poll() is not None:
            return False
        alive = [node for node in self.list("nodes") if node["node_ip"] == host.address]
        return any(node["state"] == "ALIVE" for node in alive)

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
    env |= {"RAY_health_check_period_ms": "1000", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with network(folder / "hosts", list(CPUS)) as made:
        hosts = Hosts(made, env | {"RAY_API_SERVER_ADDRESS": f"http://{made.hosts[0].address}:8265"})
        hosts.up()
        yield hosts


def submitted(hosts: Hosts) -> Callable[..., Running]:
    """What makes a run that is a job of this cluster."""

    class Submitted(Running):
        """A run that is submitted; it is followed by its log, with which the job ends."""

        def __init__(self, output: Path, overrides: Sequence[str], env: Mapping[str, str], logs: Path) -> None:
            super().__init__(output, overrides, env, logs)
            self.hosts = hosts

        def start(self) -> None:
            self.starts += 1
            job = f"start{self.starts}"
            arguments = [*self.command[5:], *SPREAD]
            done = hosts.submit("--no-wait", "--submission-id", job, train=arguments)
            if done.returncode:
                raise RuntimeError(f"the job was not taken: {done.stderr[-300:]}")
            follow = hosts.network.outside(clients.BIN / "ray", "job", "logs", "--follow", job)
            with self._log("out").open("wb") as out, self._log("err").open("wb") as err:
                self.process = subprocess.Popen(follow, cwd=ROOT, env=hosts.env, stdout=out, stderr=err)

        def code(self) -> int | None:
            """0 for a run with a summary; otherwise, once the job has ended, 1: Ray does not say which code."""
            if super().code() is None:
                return None
            return 0 if (self.folder / "summary.json").is_file() else 1

        def said(self) -> list[str]:
            """What stands in the job's log by itself: the run's last line, or a traceback."""
            lines = self._log("out").read_text(errors="replace").splitlines()
            return [line for line in lines if line.startswith((OURS, "Traceback"))]

        def close(self) -> None:
            if self.process is not None:
                self.process.kill()
                self.process.wait()

    return Submitted
