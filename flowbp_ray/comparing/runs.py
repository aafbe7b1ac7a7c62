"""Running a suite: a process per run, so many at a time, here or as jobs of a Ray cluster; what is done stays done."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowbp_ray.comparing.suite import Cell
from flowbp_ray.config.loading import dump
from flowbp_ray.utils.files import write_atomically
from flowbp_ray.utils.signals import Interrupts

LOOK = 1.0  # seconds between two looks at the processes
PATIENCE = 600.0  # seconds for a run to finish its step and save


@dataclass(frozen=True)
class Failed:
    """A run that ended with an error, or without a summary, and the file with what it printed."""

    cell: Cell
    code: int
    log: Path

    def describe(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip()[:200] if lines else "nothing"
        how = f"exit code {self.code}" if self.code else f"ended, but {self.cell.folder} has no summary.json"
        return f"{self.cell.row}, seed {self.cell.seed}: {how}, it printed: {last} ({self.log})"


def done(cell: Cell) -> bool:
    """Whether a run has ended, by its summary."""
    return (cell.folder / "summary.json").is_file()


def launch(cell: Cell, address: str | None) -> list[str]:
    """The command of a run: here, or as a job at the address of a cluster's dashboard.

    A job's configuration goes into a file beside its folder: Ray hands the command to a shell, and does not quote for
    one what an override may hold, such as {a,b} or ${HOME}.
    """
    if address is None:
        return [sys.executable, "-m", "flowbp_ray", *cell.command()]
    file = _beside(cell, ".yaml")
    write_atomically(file, lambda path: path.write_text(dump(cell.load())))
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
    return [*submit, "--submission-id", _job(cell), "--", "python", "-m", "flowbp_ray", "train", str(file)]


def _job(cell: Cell) -> str:
    return f"{cell.folder.parent.name}-{cell.folder.name}-{int(time.time())}"


def run_all(cells: Sequence[Cell], at_once: int, address: str | None, say: Callable[[str], None]) -> list[Failed]:
    """Train the runs that have not ended, in order, `at_once` at a time; return those that failed.

    Each is a process of its own session; what it prints goes into a file beside its folder. When this process is
    interrupted (see `Interrupts`) they are, and save: the same command goes on. A job of a cluster goes on by itself.
    Raises KeyboardInterrupt then.
    """
    waiting = [cell for cell in cells if not done(cell)]
    before, failed = len(cells) - len(waiting), list[Failed]()
    if before:
        say(f"{before} of {len(cells)} runs are done")
    running: dict[subprocess.Popen[bytes], Cell] = {}
    with Interrupts() as interrupts:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    cell = waiting.pop(0)
                    say(f"{cell.row}, seed {cell.seed}: started")
                    running[_start(cell, address)] = cell
                time.sleep(LOOK)
                if interrupts.asked:
                    raise KeyboardInterrupt
                for process in [p for p in running if p.poll() is not None]:
                    cell, code = running.pop(process), process.returncode
                    if wrong := bool(code) or not done(cell):
                        failed.append(Failed(cell, code, _beside(cell, ".log")))
                    ended = len(cells) - len(waiting) - len(running)
                    how = failed[-1].describe() if wrong else f"{cell.row}, seed {cell.seed}: done"
                    say(f"{how}; {ended} of {len(cells)}")
        except BaseException:
            _stop(list(running), address, say)
            raise
    return failed


def _beside(cell: Cell, suffix: str) -> Path:
    """A file beside the folder of a run, whose name may have points."""
    return cell.folder.with_name(cell.folder.name + suffix)


def _start(cell: Cell, address: str | None) -> subprocess.Popen[bytes]:
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with _beside(cell, ".log").open("ab") as file:
        return subprocess.Popen(launch(cell, address), stdout=file, stderr=file, start_new_session=True)


def _stop(processes: Sequence[subprocess.Popen[bytes]], address: str | None, say: Callable[[str], None]) -> None:
    """Ask the runs to finish their step and save; kill what does not end. Of jobs only the watching ends."""
    if processes and address is None:
        say("the runs finish their steps and save; the same command goes on")
    elif processes:
        say("the jobs go on by themselves (ray job list); give the same command once they have ended")
    for process in processes:
        process.terminate()
    until = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
