"""The processes of a run as the kernel shows them: role, memory, threads, open files, sockets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MIB = 2**20
TITLES = {
    "ray::SamplerActor": "sampler",
    "ray::RewardActor": "reward server",
    "ray::LearnerActor": "learner",
    "ray::EncoderActor": "encoder",
    "ray::ReaderActor": "encoder",
    "ray::DashboardAgent": "Ray's agent",
    "ray::RuntimeEnvAgent": "Ray's environment agent",
}
"""How Ray titles the processes, before the name of the method that they are in."""
DAEMONS = {"gcs_server": "GCS", "raylet": "raylet"}
ACTORS = ("sampler", "reward server", "learner")


@dataclass(frozen=True)
class Process:
    """A process at one moment.

    started: seconds since 1970. memory: MiB that would be free without it (USS and swap). shared: (device, inode) of
    the files in shared memory that it has open, to their allocated bytes. inodes: of its sockets.
    """

    pid: int
    started: float
    role: str
    memory: float
    threads: int
    files: int
    inodes: frozenset[str] = frozenset()
    shared: dict[tuple[int, int], int] = field(default_factory=dict)
    zombie: bool = False

    @property
    def sockets(self) -> int:
        return len(self.inodes)


def family(driver: int) -> list[psutil.Process]:
    """The driver and all that descends from it; empty where it is gone."""
    try:
        parent = psutil.Process(driver)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def look(driver: int) -> list[Process]:
    """Every process of the family as it is now, without those that end meanwhile."""
    found = []
    for process in family(driver):
        with suppress(psutil.Error, OSError):
            found.append(_seen(process, driver))
    return found


def role_of(process: psutil.Process, driver: int) -> str:
    """driver, GCS, raylet, the role of an actor, one of Ray's agents, or what the command is called."""
    if process.pid == driver:
        return "driver"
    name = process.name()
    if name in DAEMONS:
        return DAEMONS[name]
    title = process.cmdline()[:1]
    for start, role in TITLES.items():
        if title and title[0].startswith(start):
            return role
    return "another process"


def _seen(process: psutil.Process, driver: int) -> Process:
    with process.oneshot():
        started, role = process.create_time(), role_of(process, driver)
        if process.status() == psutil.STATUS_ZOMBIE:
            return Process(process.pid, started, role, 0.0, 0, 0, zombie=True)
        files, sockets, shared = _open(process.pid)
        return Process(
            process.pid, started, role, _own_memory(process.pid), process.num_threads(), files, sockets, shared
        )


def _own_memory(pid: int) -> float:
    """MiB of memory that no other process shares, in RAM or swapped out."""
    kib = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:", "SwapPss:")):
            kib += int(line.split()[1])
    return kib * 1024 / MIB


def _open(pid: int) -> tuple[int, frozenset[str], dict[tuple[int, int], int]]:
    """The number of open files, the inodes of sockets among them, and the bytes of those in shared memory."""
    count, sockets, shared = 0, set(), dict[tuple[int, int], int]()
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            target = os.readlink(f"{folder}/{name}")
            count += 1
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
            elif target.startswith(("/dev/shm/", "/memfd:")):
                stat = os.stat(f"{folder}/{name}")
                shared[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return count, frozenset(sockets), shared


def shared_memory(processes: Iterable[Process]) -> float:
    """MiB in shared memory that a family holds: each file once, whoever has it open."""
    files = {key: size for process in processes for key, size in process.shared.items()}
    return sum(files.values()) / MIB


def ports(processes: Sequence[Process]) -> int:
    """The number of TCP sockets on which these processes listen."""
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(FileNotFoundError):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            listening |= {row[9] for row in rows if row[3] == "0A"}
    return len(listening & frozenset().union(*(process.inodes for process in processes)))


def files_below(folder: Path) -> int:
    """The number of files in a folder and its folders."""
    return sum(len(names) for _, _, names in os.walk(folder))


def still_there(processes: Sequence[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those that have not ended within `timeout` seconds. What has ended and waits to be asked about it is gone."""
    _, alive = psutil.wait_procs(list(processes), timeout=timeout)
    left = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left
