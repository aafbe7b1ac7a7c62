"""The run of a soak, in a process of its own as a user starts it: its settings, its steps, and the kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from flowbp_ray.run.folder import Run
from tests import clients
from tests.paths import ROOT
from tests.small import small_overrides
from tests.soak.processes import ACTORS, family, role_of

STARTS = 600.0  # seconds until the first step, on a loaded machine
TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last line
AGAIN = 2  # steps after a kill until the run has recovered: the first may have been all but done

SETTINGS = [
    "name=soak",
    "steps=1000000",
    "checkpoint.every=5",  # so that all that are kept are there early
    "learners.optimizer.lr=1e-6",  # so long a run of four prompts would otherwise ruin the model
    "cluster.tries=20",  # kills come as fast as learners are built again, where the machine does other work
]


class SoakedRun:
    """`flowbp-ray train` on the embedded model, with every part real and all sizes small.

    environment: the run's; its private Ray has a token of its own, which whoever asks Ray's daemons must have too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "soak", folder / "output.txt"
        token = clients.new_token(folder / "token")
        more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        self.environment = clients.environment(token) | more
        command = [sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *small_overrides(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *SETTINGS, f"encoder.cache={folder}/cache"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid
        self.newest = self.done = 0

    def ended(self) -> bool:
        return self.process.poll() is not None

    def await_first_step(self) -> None:
        """Raises AssertionError with what the run printed, where there is none."""
        until = time.monotonic() + STARTS
        while not self.count():
            assert time.monotonic() < until and not self.ended(), self.log.read_text()
            time.sleep(0.25)

    def count(self) -> int:
        """The steps done so far, also those that were done again after learners were lost."""
        newest = last_step(self.folder / "metrics.jsonl")
        self.done += max(0, newest - self.newest)
        self.newest = newest
        return self.done

    def stop(self, timeout: float = 300.0) -> int | None:
        """Ctrl-C once; return the exit code, None where it did not end within `timeout` seconds and was killed."""
        if not self.ended():
            os.killpg(self.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout)
        self.kill()
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def faults(self) -> list[str]:
        """What is wrong with the files that the run left."""
        run, said = Run.open(self.folder), self.log.read_text()
        steps = [line["step"] for line in run.metrics() if line["kind"] == "train"]
        found = []
        if steps != list(range(len(steps))):
            found.append("metrics.jsonl lacks steps, or has some twice")
        if run.checkpoints.steps()[-1:] != [len(steps)]:
            found.append(
                f"the newest checkpoint is of step {run.checkpoints.steps()[-1:]}, the log ends at {len(steps)}"
            )
        if (self.folder / "driver.json").exists():
            found.append("driver.json is still there")
        if "Traceback" in said:
            found.append(f"a traceback: {said[-500:]}")
        return found


def last_step(file: Path) -> int:
    """The number of steps in metrics.jsonl, by its last whole line."""
    with suppress(FileNotFoundError), file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - TAIL))
        for line in reversed(lines.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"]) + 1
    return 0


@dataclass
class Kill:
    """seconds: since the first step. doing: how Ray titled the process. recovered: seconds until AGAIN steps more."""

    seconds: float
    role: str
    doing: str
    steps: int
    recovered: float | None = None


class Killer:
    """SIGKILL to a random actor: first to one of each role, in random order, then to whichever lives."""

    def __init__(self, run: SoakedRun, seed: int) -> None:
        self.run, self.random = run, random.Random(seed)
        self.first = self.random.sample(ACTORS, len(ACTORS))
        self.kills: list[Kill] = []

    def strike(self, seconds: float) -> bool:
        """Kill one; False where none lives. seconds: since the first step."""
        living: dict[str, list[tuple[psutil.Process, str]]] = {}
        for process in family(self.run.pid):
            with suppress(psutil.Error):
                role = role_of(process, self.run.pid)
                if role in ACTORS and process.status() != psutil.STATUS_ZOMBIE:
                    living.setdefault(role, []).append((process, process.cmdline()[0].strip()))
        roles = [role for role in self.first[:1] if role in living] or sorted(living)
        if not roles:
            return False
        role = self.random.choice(roles)
        process, doing = self.random.choice(living[role])
        with suppress(psutil.NoSuchProcess):
            process.kill()
            self.first = [one for one in self.first if one != role]
            self.kills.append(Kill(seconds, role, doing, self.run.count()))
        return True

    def recovered(self) -> bool:
        """Whether the run has recovered from the last kill."""
        return not self.kills or self.kills[-1].recovered is not None

    def notice(self, seconds: float) -> None:
        """Note which kills the run has recovered from by now."""
        for kill in self.kills:
            if kill.recovered is None and self.run.done >= kill.steps + AGAIN:
                kill.recovered = seconds - kill.seconds
