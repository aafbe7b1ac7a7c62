"""The processes of a run, seen from outside: proc(5) tells who descends from its driver, and what each one does.

Ray names a worker's process after its call, such as `ray::SamplerActor.rollout`.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

LOOK = 0.4  # seconds between two looks for processes that are new

Process = tuple[int, int]
"""A process id, and when it started in ticks since the boot: a number that is used again is another process."""


class Family:
    """All processes that descend from a driver, or whose command names `mark`; also once their parents have ended."""

    def __init__(self, driver: int, mark: str) -> None:
        self.mark, self.seen, self.looked = mark, dict[int, int](), 0.0
        if found := stat(driver):
            self.seen[driver] = found[1]

    def look(self, at_once: bool = False) -> None:
        """Note who is new; at most every LOOK seconds unless `at_once`."""
        if not at_once and time.monotonic() - self.looked < LOOK:
            return
        parents, started = dict[int, int](), dict[int, int]()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and (found := stat(int(entry))):
                parents[int(entry)], started[int(entry)] = found
        ours = {pid for pid, ticks in self.seen.items() if started.get(pid) == ticks}
        for pid in parents:
            above, line = pid, []
            while above in parents and above not in ours:
                line.append(above)
                above = parents[above]
            if above in ours:
                ours.update(line)
            elif self.mark and pid != os.getpid() and self.mark in " ".join(command(pid)):
                ours.add(pid)
        self.seen |= {pid: started[pid] for pid in ours}
        self.looked = time.monotonic()

    def alive(self) -> list[Process]:
        """Those that have not ended. One that waits for its parent to ask has."""
        return [(pid, ticks) for pid, ticks in self.seen.items() if runs((pid, ticks))]

    def doing(self, title: str) -> list[Process]:
        """The processes whose title begins so. Asked every few milliseconds, so it looks at the titles first."""
        titled = [one for one in self.seen.items() if command(one[0])[0].startswith(title)]
        return [one for one in titled if runs(one)]

    def named(self, part: str) -> list[Process]:
        """The processes whose command has `part` in it."""
        return [found for found in self.alive() if part in " ".join(command(found[0]))]


def stat(pid: int) -> tuple[int, int] | None:
    """The parent of a process and when it started; None for one that has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if not fields or fields[0] in "ZX" else (int(fields[1]), int(fields[19]))


def runs(process: Process) -> bool:
    found = stat(process[0])
    return found is not None and found[1] == process[1]


def command(pid: int) -> list[str]:
    """The title of a process, or its command's words; an empty word for one that is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().rstrip(b"\0").decode(errors="replace").split("\0")
    except OSError:
        return [""]


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal to a process that still runs; return whether it did."""
    if not runs(process):
        return False
    with suppress(ProcessLookupError):
        os.kill(process[0], number)
        return True
    return False


def end(processes: list[Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        send(process, signal.SIGKILL)
    until = time.monotonic() + 30
    while any(map(runs, processes)) and time.monotonic() < until:
        time.sleep(0.05)
