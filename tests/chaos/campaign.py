"""Runs with faults in them, compared with undisturbed ones: a record of each fault."""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.configurations import STALL, overrides
from tests.chaos.disk import Disk
from tests.chaos.faults import BY_NAME, FOREVER, Kind, Missed, Scene, stop_filling
from tests.chaos.hosts import SPREAD, cluster
from tests.chaos.planner import Plan, Planned
from tests.chaos.processes import Family, command, end
from tests.chaos.running import Interrupted, Result, Running, environment, fault_of_stop

SURVIVED, RESUMED, MISSED = "survived", "resumed", "not injected"
HANGS = 300.0  # seconds without a step and without an end
HELD = 60.0  # seconds for which a fault is held at most, where it is to last until the run has stopped
STARTS = 3  # of the same command after a fault, until there is a step
BURIED = 120.0  # seconds after a run's end within which its processes are gone: Ray's agents look for their GCS for 60
REBUILT = 100.0  # seconds in which a run goes on once it has noticed what stood still, beside another on two cores
WAIT = 0.02  # seconds


@dataclass
class Record:
    """What became of a fault. outcome: SURVIVED, RESUMED, or what is wrong. hit: who it was done to; "" if nobody was.

    line: what the run said as it stopped. seconds: from the fault to the next step that was finished. differs: how the
    run's result is not that of the undisturbed one. left: processes of the run that outlived it.
    """

    kind: str
    config: str
    run: int
    step: int
    hit: str = ""
    outcome: str = ""
    line: str = ""
    seconds: float | None = None
    differs: str = ""
    left: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.outcome in (SURVIVED, RESUMED) and not self.differs and not self.left

    @property
    def injected(self) -> bool:
        return bool(self.hit)


@dataclass
class Grave:
    """The processes of a driver that ended at `since`; the record of the fault that came last before."""

    family: Family
    since: float
    record: Record | None

    def look(self) -> None:
        """Wait until BURIED; note in the record who is left, and end them."""
        while (left := self.family.alive()) and time.monotonic() < self.since + BURIED:
            time.sleep(0.2)
        if self.record is not None:
            self.record.left += [" ".join(command(pid))[:120] for pid, _ in left]
        end(left)


@contextmanager
def folder() -> Iterator[Path]:
    """For a campaign: a short path, because Ray's sockets are below it; removed at the end."""
    work = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Campaign:
    """Undisturbed runs, one per configuration as it is needed, and runs with faults. work: a folder of its own.

    Runs may go beside each other, in threads.
    """

    def __init__(self, work: Path, seed: int, say: Callable[[str], object] = print) -> None:
        self.work, self.seed, self.say = work, seed, say
        self.wanted: dict[str, Result] = {}
        self.locks = defaultdict[str, threading.Lock](threading.Lock)
        self.graves: list[Grave] = []
        self.running: list[Running] = []
        self.interrupted = threading.Event()

    def run(self, planned: Sequence[Plan], at_once: int, until: float = math.inf) -> list[Record]:
        """The records of all runs, `at_once` beside each other, in the order of the plan.

        until: of time.monotonic(), after which none is begun. An interrupt ends those at work, whose records are lost.
        """

        def go(plan: Plan) -> list[Record]:
            if self.interrupted.is_set() or time.monotonic() > until:
                self.say(f"run {plan.number} is left out")
                return []
            return self.go(plan)

        lanes, futures = ThreadPoolExecutor(at_once), dict[int, Future[list[Record]]]()
        # what stands still is waited for, and leaves the cores to the run beside it
        first = sorted(planned, key=lambda plan: not plan.stalls)
        try:
            for plan in first:
                futures[plan.number] = lanes.submit(go, plan)
            while not all(future.done() for future in futures.values()):
                time.sleep(0.2)
        except KeyboardInterrupt:
            self.say("interrupted: the runs at work and those after them are left out")
            self.interrupted.set()
            for running in self.running:
                running.family.look(at_once=True)
                end(running.family.alive())
        lanes.shutdown()
        whole = [future for _, future in sorted(futures.items()) if not isinstance(future.exception(), Interrupted)]
        return [record for future in whole for record in future.result()]

    @contextmanager
    def scene(self, name: str, config: str, stalls: bool = False) -> Iterator[Scene]:
        """A run that has been started, on a disk of its own; whatever is left of it in the end is ended."""
        place = self.work / name
        (place / "t").mkdir(parents=True)
        env, arguments, before = environment(self.work, place / "t"), overrides(config, place, stalls), []
        on_hosts = config == "hosts" and name != config  # undisturbed it runs on one
        with Disk(place / "d") as disk, cluster(place / "h", on_hosts) as hosts:
            if hosts is not None:
                env = hosts.env | {key: env[key] for key in ("FLOWBP_RAY_CACHE", "TMPDIR")}
                env["RAY_ADDRESS"] = f"{hosts.network.hosts[0].address}:6379"
                arguments, before = arguments + SPREAD, hosts.enter()
            running = Running(disk.folder, arguments, env, place, before, self.interrupted)
            scene = Scene(running, disk, random.Random(f"{self.seed} {name}"), hosts)
            self.running.append(running)
            try:
                running.start()
                yield scene
            finally:
                stop_filling(scene)
                running.family.look(at_once=True)
                self.graves.append(Grave(running.family, time.monotonic(), None))
                end(running.family.alive() if running.code() is None else [])
        shutil.rmtree(place / "d", ignore_errors=True)

    def want(self, config: str) -> Result:
        """What the run of a configuration gives that nothing is done to."""
        with self.locks[config]:
            if config not in self.wanted:
                with self.scene(config, config) as scene:
                    self.to_the_end(scene)
                    self.wanted[config] = scene.running.result()
            return self.wanted[config]

    def to_the_end(self, scene: Scene) -> None:
        """Raises RuntimeError where the run fails or hangs, and Interrupted."""
        running, moved, seen = scene.running, time.monotonic(), scene.running.steps.look()
        while (code := running.code()) is None:
            if running.steps.look() > seen:
                moved, seen = time.monotonic(), running.steps.seen
            if time.monotonic() - moved > HANGS:
                raise RuntimeError(f"no step in {HANGS:.0f} s")
            running.family.look()
            time.sleep(WAIT)
        if code:
            running.check()
            raise RuntimeError(f"exit code {code}: {' | '.join(running.said()[-3:])}")

    def go(self, plan: Plan) -> list[Record]:
        """A run with its faults; the records of all of them. Raises Interrupted."""
        want, records = self.want(plan.config), [Record(f.kind, plan.config, plan.number, f.step) for f in plan.faults]
        with self.scene(f"{plan.number:02}", plan.config, plan.stalls) as scene:
            try:
                for planned, record in zip(plan.faults, records, strict=True):
                    self.inject(scene, planned, record, last(records))
                    self.say(told(record))
                self.end(scene, last(records))
                differs = want.differs(scene.running.result())
            except RuntimeError as error:
                scene.running.check()
                differs = f"did not come to its end: {error}"
        for record in records:
            record.outcome = record.outcome or f"{MISSED}: the run had not come so far"
            record.differs = differs if record.injected else ""
        for grave in self.graves:
            if grave.family is scene.running.family:
                grave.record = last(records)
        self.say(f"run {plan.number} ({plan.config}): {differs or 'as the undisturbed one, bit for bit'}")
        return records

    def end(self, scene: Scene, before: Record | None) -> None:
        """Follow a run to its end. before: the last fault, to which belongs a stop. Raises RuntimeError as `inject`."""
        for _ in range(STARTS):
            try:
                return self.to_the_end(scene)
            except RuntimeError:
                if before is None or scene.running.code() in (0, None):
                    raise
            self.late(scene, before)
        raise RuntimeError(f"it stopped {STARTS} times after one fault")

    def late(self, scene: Scene, before: Record) -> None:
        """A run has stopped of a fault after it seemed to have recovered: note that, and start it again."""
        before.seconds = None
        self.stopped(scene, BY_NAME[before.kind], before)
        self.say(f"and then {told(before)}")

    def inject(self, scene: Scene, planned: Planned, record: Record, before: Record | None) -> None:
        """Wait for the moment, strike, and follow the run until it goes on.

        before: the last fault that was injected, to which belongs what happens before this one. Raises RuntimeError
        where the run stops and no fault was injected, or stops each time.
        """
        kind, steps = BY_NAME[planned.kind], scene.running.steps
        for _ in range(STARTS):
            try:
                scene.until(lambda: steps.done >= planned.step)
                record.hit = kind.strike(scene)
            except Missed as error:
                if scene.running.code() in (0, None):
                    record.outcome = f"{MISSED}: {error}"
                    return
                if before is None:
                    raise RuntimeError(f"it stopped by itself: {' | '.join(scene.running.said()[-3:])}") from error
                self.late(scene, before)
                continue
            record.step = steps.done
            self.recover(scene, kind, record)
            return
        raise RuntimeError(f"it stopped {STARTS} times after one fault")

    def recover(self, scene: Scene, kind: Kind, record: Record) -> None:
        """Until a step is done and the fault is taken back; where the run has stopped, start it again.

        Raises RuntimeError where it hangs, or stops each time.
        """
        running, began = scene.running, time.monotonic()
        seen, moved, stops, healed = running.steps.look(), began, 0, kind.heal is None
        lasts = HELD if kind.lasts == FOREVER else kind.lasts
        record.outcome = SURVIVED
        while record.seconds is None or not healed:
            code, now = running.code(), time.monotonic()
            if not healed and (code is not None or now > began + lasts) and kind.heal is not None:
                kind.heal(scene)
                healed = True
            if code is not None and code != 0:
                stops, moved, record.seconds = stops + 1, now, None
                self.stopped(scene, kind, record, by_us=kind.ends and stops == 1)
                seen = running.steps.seen
                if stops == STARTS:
                    record.outcome = "did not go on"
                    raise RuntimeError(f"it stopped {stops} times after one fault")
            elif record.seconds is None and (code == 0 or running.steps.look() >= seen + kind.steps):
                record.seconds = round(now - began, 1)
            elif now - moved > HANGS:
                record.outcome, record.line = "hung", f"no step in {HANGS:.0f} s"
                raise RuntimeError(record.line)
            running.family.look()
            time.sleep(WAIT)
        if kind.stalls and record.seconds > STALL + REBUILT + kind.lasts:
            record.outcome = f"noticed after more than {STALL} s"

    def stopped(self, scene: Scene, kind: Kind, record: Record, by_us: bool = False) -> None:
        """Note how the run stopped, and give the same command again. Raises Interrupted."""
        running, code = scene.running, scene.running.code()
        running.check()
        assert code is not None
        wrong, line = ("", "") if by_us and code == -9 else fault_of_stop(code, running.said(), kind.names)
        record.line = record.line or line
        if record.outcome in (SURVIVED, RESUMED):
            record.outcome = wrong or RESUMED
        running.family.look(at_once=True)
        self.graves.append(Grave(running.family, time.monotonic(), record))
        if wrong:
            self.say(f"run {record.run} stopped with {wrong}:\n{running.printed()[-3000:]}")
        running.start()

    def bury(self) -> None:
        """Look after the processes of all runs that have ended."""
        for grave in self.graves:
            grave.look()
        self.graves = []


def last(records: Sequence[Record]) -> Record | None:
    """The last fault that was injected."""
    return next((record for record in reversed(records) if record.injected), None)


def told(record: Record) -> str:
    seconds = "" if record.seconds is None else f", {record.seconds:.1f} s"
    line = f": {record.line}" if record.line else ""
    return f"run {record.run}, step {record.step}: {record.kind} ({record.hit}): {record.outcome}{seconds}{line}"


def faults(records: Sequence[Record]) -> list[Record]:
    """Those that went wrong."""
    return [record for record in records if record.injected and not record.good]
