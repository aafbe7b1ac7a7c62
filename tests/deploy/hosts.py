"""Hosts on this machine, in namespaces: each has its own network, name, processes, /dev/shm, /tmp/ray and /etc/hosts.

All other files are shared, as on a cluster with shared storage. `missing` says what is not here that this needs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

NETWORK = "10.77.0"  # exists in namespaces of our own only, so nothing else can be using it
GATE = f"{NETWORK}.254"
TOOLS = ("ip", "unshare", "setpriv", "mount")
ALONE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# Process 1 of a host. `wait` also collects processes whose parents have ended. No name server could be reached.
BOOT = """
set -eu
echo "$1" > /proc/sys/kernel/hostname
mount -t tmpfs -o size=400m tmpfs /dev/shm
mount --bind "$2/ray" /tmp/ray
mount --bind "$2/hosts" /etc/hosts
if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi
shift 2
"$@" &
wait $!
"""


class Host:
    """A host that runs one command and ends with it."""

    def __init__(self, name: str, address: str, namespace: str, folder: Path) -> None:
        self.name, self.address, self.namespace, self.folder = name, address, namespace, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        own = [*ALONE, "sh", "-c", BOOT, "host", self.name, self.folder, *command]
        with self.log.open("w") as log:
            # Ends with this process, however that ends.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace, *own],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        """What its command prints."""
        return self.folder / "log"

    def says(self, text: str) -> bool:
        """Wait until its command prints `text`; False where it ends instead."""
        assert self.process is not None
        while self.process.poll() is None and text not in self.log.read_text():
            time.sleep(0.2)
        return text in self.log.read_text()

    def kill(self) -> None:
        """Power off: every process of the host is gone when this returns."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        while _ip("netns", "pids", self.namespace).stdout.strip():
            time.sleep(0.05)
        self.process = None


class Network:
    """Hosts on one bridge, and an outside from where they are reached: the bridge's own namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, own_name()
        self.namespaces: list[str] = []
        self.hosts: list[Host] = []

    def build(self, names: Sequence[str]) -> None:
        Path("/tmp/ray").mkdir(exist_ok=True)  # to mount on
        outside = self._namespace("outside")
        _must("-n", outside, "link", "add", "bridge", "type", "bridge")
        _must("-n", outside, "address", "add", f"{GATE}/24", "dev", "bridge")
        _must("-n", outside, "link", "set", "bridge", "up")
        addresses = {name: f"{NETWORK}.{i}" for i, name in enumerate(names, 1)}
        for name, address in addresses.items():
            own = self._namespace(name)
            _must("-n", outside, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", own)
            _must("-n", outside, "link", "set", name, "master", "bridge", "up")
            _must("-n", own, "address", "add", f"{address}/24", "dev", "eth0")
            _must("-n", own, "link", "set", "eth0", "up")
            _must("-n", own, "route", "add", "default", "via", GATE)  # by which Ray finds its own address
            others = "".join(f"{a} {n}\n" for n, a in addresses.items() if n != name)
            folder = self.folder / name
            (folder / "ray").mkdir(parents=True)
            # As Debian installs itself: a host's own name is an address that no other host can reach.
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
            self.hosts.append(Host(name, address, own, folder))

    def _namespace(self, name: str) -> str:
        full = f"{self.name}-{name}"
        _must("netns", "add", full)
        self.namespaces.append(full)
        _must("-n", full, "link", "set", "lo", "up")
        return full

    def outside(self, *command: str | Path) -> list[str | Path]:
        """A command, to be run outside of the hosts and within their reach."""
        return ["ip", "netns", "exec", self.namespaces[0], *command]

    def remove(self) -> None:
        """Links go with their namespaces."""
        for host in self.hosts:
            host.kill()
        for namespace in self.namespaces:
            _ip("netns", "delete", namespace)


@contextmanager
def network(folder: Path, names: Sequence[str]) -> Iterator[Network]:
    """Hosts of these names, off; what was made is taken away in all cases."""
    made = Network(folder)
    try:
        made.build(names)
        yield made
    finally:
        made.remove()


def missing() -> str:
    """Why there can be no hosts here, or nothing. Tries each kind of namespace, link and mount once."""
    if sys.platform != "linux" or os.geteuid():
        return "hosts in network namespaces need root on Linux"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"hosts in network namespaces need {', '.join(absent)} (Debian: iproute2, util-linux)"
    trial = own_name()
    attempts = (
        ("ip", "netns", "add", trial),
        ("ip", "-n", trial, "link", "add", "bridge", "type", "bridge"),
        ("ip", "-n", trial, "link", "add", "one", "type", "veth", "peer", "name", "two"),
        ("ip", "netns", "exec", trial, *ALONE, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"),
    )
    try:
        for attempt in attempts:
            done = subprocess.run(attempt, capture_output=True, text=True)
            if done.returncode:
                return f"hosts in network namespaces are not permitted here: {done.stderr.strip().splitlines()[-1]}"
    finally:
        _ip("netns", "delete", trial)
    return ""


def own_name() -> str:
    """Of no other run, not even of one that was killed and left its namespaces."""
    return f"flowbp-{os.getpid()}-{secrets.token_hex(3)}"


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


def _must(*arguments: str) -> None:
    done = _ip(*arguments)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
