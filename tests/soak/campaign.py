"""A soak: a run, a kill every few seconds, and a look at everything in between."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.processes import Process, family, files_below, look, ports, role_of, still_there
from tests.soak.raylet import Raylet, Store
from tests.soak.run import Kill, Killer, SoakedRun

EVERY = 20.0  # seconds between kills
QUIET = 0.2  # of the time, at its end, without kills: an actor that lives longer shows what grows in it
LONGEST = 90.0  # or as many as the run takes to recover from the last one, but at most these
LOOK = 5.0  # seconds between samples
POLL = 0.25
GONE = 120.0  # seconds after the end in which every process must have ended


@dataclass(frozen=True)
class Sample:
    """seconds: since the first step. session_files: in Ray's folder. output_files: in the run's."""

    seconds: float
    steps: int
    kills: int
    processes: list[Process]
    store: Store | None
    ports: int
    session_files: int
    output_files: int


@dataclass
class Record:
    """What was seen. faults: what is wrong whatever the slopes say."""

    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def soak(
    folder: Path,
    minutes: float,
    seed: int = 17,
    every: float = EVERY,
    say: Callable[[str], object] = lambda line: None,
) -> Record:
    """Run for `minutes` after the first step, then Ctrl-C. folder: an empty one."""
    record, run = Record(), SoakedRun(folder)
    try:
        run.await_first_step()
        with Raylet(next(p for p in family(run.pid) if role_of(p, run.pid) == "raylet"), run.environment) as raylet:
            _watch(run, raylet, record, minutes * 60, every, seed, say)
        members = {process.pid: process for process in family(run.pid)}
        code = run.stop()
        if code != 130:
            record.faults.append(f"the run ended with {code} after Ctrl-C: {run.log.read_text()[-500:]}")
        left = still_there(list(members.values()), GONE)
        record.faults += [f"process {process.pid} ({process.name()}) is still there" for process in left]
        record.faults += run.faults()
    finally:
        run.kill()
    return record


def _watch(
    run: SoakedRun,
    raylet: Raylet,
    record: Record,
    seconds: float,
    every: float,
    seed: int,
    say: Callable[[str], object],
) -> None:
    killer, began = Killer(run, seed), time.monotonic()
    record.kills = killer.kills
    next_kill, next_look, next_line = every, 0.0, 60.0
    while (now := time.monotonic() - began) < seconds:
        if run.ended():
            record.faults.append(f"the run ended after {now:.0f} s: {run.log.read_text()[-500:]}")
            break
        run.count()
        killer.notice(now)
        late = now >= next_kill + LONGEST - every
        striking = next_kill <= now < (1 - QUIET) * seconds
        if striking and (killer.recovered() or late) and killer.strike(now):
            next_kill = now + every
        if now >= next_look:
            record.samples.append(_sample(run, raylet, now, len(killer.kills)))
            next_look = now + LOOK
        if now >= next_line:
            say(f"{now:.0f} s, {run.done} steps, {len(killer.kills)} kills")
            next_line += 60.0
        time.sleep(POLL)
    record.seconds = now


def _sample(run: SoakedRun, raylet: Raylet, seconds: float, kills: int) -> Sample:
    processes, store = look(run.pid), raylet.ask()
    session, output = files_below(Path(raylet.session)), files_below(run.folder)
    return Sample(seconds, run.done, kills, processes, store, ports(processes), session, output)


def in_a_new_folder(minutes: float, seed: int, say: Callable[[str], object]) -> Record:
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        return soak(Path(folder), minutes, seed, say=say)
