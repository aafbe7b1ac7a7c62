"""The kinds of faults: what is done to a run, at which moment, and how it is taken back."""

from __future__ import annotations

import itertools
import math
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.chaos.disk import BLOCK, Disk, mountable
from tests.chaos.processes import Process, command, send
from tests.chaos.running import Running
from tests.deploy.hosts import missing
from tests.paths import ROOT

T = TypeVar("T")
PAUSE = 0.003  # seconds between two looks for the moment
PATIENCE = 300.0  # seconds in which the moment comes
FOREVER = math.inf
ALONE = ("one", "two")  # configurations with a private Ray, see `configurations`


class Missed(Exception):
    """The moment did not come."""


@dataclass
class Scene:
    """A run that faults are injected into. cluster: its hosts, if it has some of its own. filler: see `fill_store`."""

    running: Running
    disk: Disk
    random: random.Random
    cluster: Any = None
    filler: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def until(self, find: Callable[[], T], patience: float = PATIENCE) -> T:
        """What `find` returns, once it is true. Raises Missed where the run ends before, or takes too long."""
        until = time.monotonic() + patience
        while not (found := find()):
            if self.running.code() is not None:
                raise Missed("the run had ended")
            if time.monotonic() > until:
                raise Missed(f"not within {patience:.0f} s")
            time.sleep(PAUSE)
            self.running.family.look()
            self.running.steps.look()
        return found

    def driver(self) -> Process:
        assert self.running.process is not None
        pid = self.running.process.pid
        return pid, self.running.family.seen[pid]


Strike = Callable[[Scene], str]
"""Waits for its moment, does it, and says to whom."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault. names: what the line must match that a run says which stops because of it.

    times: in the whole campaign. configs: in which it is tried. heal: takes it back, `lasts` seconds later or when the
    run has stopped. ends: it ends the driver, which then cannot say a line. stalls: it is noticed by `stall_timeout`,
    and not in the next step already, which may have all that it needs.
    """

    name: str
    strike: Strike
    times: int
    names: str
    configs: tuple[str, ...] = ALONE
    heal: Callable[[Scene], object] | None = None
    lasts: float = 0.0
    ends: bool = False
    stalls: bool = False

    @property
    def steps(self) -> int:
        """How many steps show that the run goes on: what stood still is waited for a step later at staleness 1."""
        return 3 if self.stalls else 1

    def impossible(self) -> str:
        """Why it cannot be tried here; nothing where it can."""
        if "hosts" in self.configs:
            return missing()
        return "" if self.heal in (None, stop_filling) or mountable() else "needs root, to mount a disk of its own"


def at_work(title: str, number: signal.Signals = signal.SIGKILL) -> Strike:
    """A signal to a process within the call of this title: at a random moment of it, as far as it lasts."""

    def strike(scene: Scene) -> str:
        for misses in itertools.count():
            who = scene.random.choice(scene.until(lambda: scene.running.family.doing(title)))
            time.sleep(scene.random.uniform(0, 0.06) * 0.8**misses)
            if command(who[0])[0].startswith(title) and send(who, number):
                return f"process {who[0]} in {title.removeprefix('ray::')}"
        raise AssertionError

    return strike


def driver_during(title: str) -> Strike:
    """SIGKILL to the driver, while one of its actors is within the call of this title."""

    def strike(scene: Scene) -> str:
        for misses in itertools.count():
            who = scene.random.choice(scene.until(lambda: scene.running.family.doing(title)))
            time.sleep(scene.random.uniform(0, 0.06) * 0.8**misses)
            if command(who[0])[0].startswith(title) and send(scene.driver(), signal.SIGKILL):
                return f"the driver, during {title.removeprefix('ray::')}"
        raise AssertionError

    return strike


def driver_writing(scene: Scene) -> str:
    """While the driver writes its own files of a checkpoint, which come after the ranks'."""
    own = ("evaluations.npz", "average.safetensors", "weights.safetensors")
    while True:
        scene.until(lambda: [file for file in scene.running.partial() if file.name in own])
        time.sleep(scene.random.uniform(0, 0.02))
        if (there := [file.name for file in scene.running.partial()]) and send(scene.driver(), signal.SIGKILL):
            return f"the driver, when {', '.join(sorted(there))} were there"


def driver_between(scene: Scene) -> str:
    seen = scene.running.steps.look()
    scene.until(lambda: scene.running.steps.look() > seen)
    send(scene.driver(), signal.SIGKILL)
    return "the driver, as a step was logged"


def driver_starting(scene: Scene) -> str:
    """Twice: once in a step, and then when it has built some of the actors again."""
    said = driver_during("ray::SamplerActor.rollout")(scene)
    assert scene.running.process is not None
    scene.running.process.wait()
    scene.running.start()
    return f"{said}; {driver_during('ray::LearnerActor.build')(scene)}"


def daemon(path: str) -> Strike:
    """SIGKILL to one of Ray's own processes, at any moment of a step."""

    def strike(scene: Scene) -> str:
        def find() -> list[Process]:
            return [who for who in scene.running.family.alive() if command(who[0])[0].endswith(path)]

        time.sleep(scene.random.uniform(0, 1.0))
        who = scene.until(find)[0]
        send(who, signal.SIGKILL)
        return f"{path} (process {who[0]})"

    return strike


def engine(scene: Scene) -> str:
    """SIGKILL to the server that a judge has started, at any moment of a step."""

    def find() -> list[Process]:
        found = scene.running.family.named("vllm.entrypoints")
        return [who for who in found if not any("leash.py" in word for word in command(who[0]))]

    time.sleep(scene.random.uniform(0, 1.0))
    who = scene.until(find)[0]
    send(who, signal.SIGKILL)
    return f"the judge's server (process {who[0]})"


def full_while_saving(scene: Scene) -> str:
    """The disk becomes full when the first bytes of a checkpoint are on it."""
    scene.until(lambda: any(file.stat().st_size for file in scene.running.folder.glob("checkpoints/*.partial/*/*")))
    scene.disk.fill()
    return "when a rank had begun to write"


def full_while_logging(room: bool) -> Strike:
    """The disk becomes full in the middle of a step. room: whether its line fits into the last page of metrics.jsonl.

    Where it fits, it is status.json that cannot be written any more.
    """

    def fits(scene: Scene) -> bool:
        size = scene.running.steps.file.stat().st_size
        return (BLOCK - size % BLOCK > 1.3 * size / scene.running.steps.done) is room

    def strike(scene: Scene) -> str:
        for _ in range(4):
            seen = scene.running.steps.look()
            scene.until(lambda: scene.running.family.doing("ray::LearnerActor.step"))
            if fits(scene):
                break
            scene.until(lambda seen=seen: scene.running.steps.look() > seen)  # type: ignore[misc]
        scene.disk.fill()
        return f"in a step, with{'' if fits(scene) else 'out'} room for a line in the last page of metrics.jsonl"

    return strike


def read_only(scene: Scene) -> str:
    scene.until(lambda: scene.running.family.doing("ray::LearnerActor.step"))
    scene.disk.freeze(scene.running.folder)
    return "in a step"


def fill_store(scene: Scene) -> str:
    """Another program puts more into the run's object store than it holds, and keeps it all in use."""
    address = next(
        found.group(1)
        for who in scene.until(lambda: scene.running.family.named("--gcs-address="))
        if (found := re.search(r"--gcs-address=([\w.:]+)", " ".join(command(who[0]))))
    )
    scene.filler = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.filler", address], cwd=ROOT, env=scene.running.env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert scene.filler.stdout is not None
    ready = select.select([scene.filler.stdout], [], [], PATIENCE)[0]
    said = scene.filler.stdout.readline().decode().strip() if ready else ""
    if not said:
        scene.filler.kill()
        _, error = scene.filler.communicate()
        raise Missed(f"the filler said {error.decode(errors='replace').strip()[-300:]!r}")
    return said


def stop_filling(scene: Scene) -> None:
    if scene.filler is not None:
        scene.filler.kill()
        scene.filler.communicate()
        scene.filler = None


def node_lost(scene: Scene) -> str:
    """The power of the host fails that has samplers only."""
    scene.cluster.network.hosts[2].kill()
    return "host3"


def cut(index: int) -> Strike:
    """No packet reaches a host, and none leaves it."""

    def strike(scene: Scene) -> str:
        scene.cluster.cut(scene.cluster.network.hosts[index])
        return scene.cluster.network.hosts[index].name

    return strike


def mend_hosts(scene: Scene) -> None:
    """Hosts that were lost or cut off come back as an operator brings them back: `ray start` anew."""
    scene.cluster.mend()


SAMPLER, REWARD, LEARNER = (f"ray::{name}Actor" for name in ("Sampler", "Reward", "Learner"))
LOST = r"learner|lost"
STALLED = r"nothing moved for|did not answer within"
FULL = r"no space|no room|full"

KINDS = [
    Kind("a sampler is killed while it rolls out", at_work(f"{SAMPLER}.rollout"), 10, "sampler"),
    Kind("a reward server is killed while it scores", at_work(f"{REWARD}.score"), 8, "reward server"),
    Kind("a learner rank is killed in a backward", at_work(f"{LEARNER}.step"), 5, LOST),
    Kind("a learner rank is killed in a publish", at_work(f"{LEARNER}.publish"), 3, LOST),
    Kind("a learner rank is killed in a save", at_work(f"{LEARNER}.save"), 3, LOST),
    Kind("the driver is killed while samplers roll out", driver_during(f"{SAMPLER}.rollout"), 1, "", ends=True),
    Kind("the driver is killed while learners step", driver_during(f"{LEARNER}.step"), 1, "", ends=True),
    Kind("the driver is killed while weights are published", driver_during(f"{LEARNER}.publish"), 1, "", ends=True),
    Kind("the driver is killed while ranks save", driver_during(f"{LEARNER}.save"), 1, "", ends=True),
    Kind("the driver is killed while it writes a checkpoint", driver_writing, 2, "", ends=True),
    Kind("the driver is killed between two steps", driver_between, 1, "", ends=True),
    Kind("the driver is killed while it starts", driver_starting, 1, "", ends=True),
    Kind("the raylet is killed", daemon("raylet/raylet"), 2, "raylet"),
    Kind("the GCS is killed", daemon("gcs/gcs_server"), 2, "GCS"),
    Kind("a sampler stands still", at_work(f"{SAMPLER}.rollout", signal.SIGSTOP), 1, STALLED, ("two",), stalls=True),
    Kind("a reward server stands still", at_work(f"{REWARD}.score", signal.SIGSTOP), 1, STALLED, ("two",), stalls=True),
    Kind("a learner rank stands still", at_work(f"{LEARNER}.step", signal.SIGSTOP), 2, STALLED, ("two",), stalls=True),
    Kind("the disk is full: a checkpoint", full_while_saving, 2, FULL, heal=lambda s: s.disk.empty(), lasts=FOREVER),
    Kind("the disk is full: metrics.jsonl", full_while_logging(False), 1, FULL, heal=lambda s: s.disk.empty(),
         lasts=FOREVER),
    Kind("the disk is full: status.json", full_while_logging(True), 2, FULL, heal=lambda s: s.disk.empty(), lasts=2.5),
    Kind("the folder is read-only", read_only, 1, "read-only", heal=lambda s: s.disk.thaw(), lasts=FOREVER),
    Kind("the object store is full", fill_store, 3, "object store", heal=stop_filling, lasts=5.0),
    Kind("the judge's engine is killed", engine, 5, "judge", configs=("judged",)),
    Kind("the judge's process is killed", at_work("ray::JudgeActor.weights"), 2, "judge", configs=("judged",)),
    Kind("a node is lost", node_lost, 1, LOST, configs=("hosts",), heal=mend_hosts, lasts=40.0,
         stalls=True),
    Kind("the network to a sampler's node is cut", cut(2), 1, LOST, configs=("hosts",), heal=mend_hosts, lasts=40.0,
         stalls=True),
    Kind("the network to a learner's node is cut", cut(1), 1, LOST, configs=("hosts",), heal=mend_hosts, lasts=40.0,
         stalls=True),
]  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
