"""A run as a user starts it, in a process and a session of its own, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowbp_ray.run.folder import Run
from tests.chaos.processes import Family
from tests.paths import ROOT
from tests.small import WAITED

NAME = "run"
OURS = "flowbp-ray: "  # how the line begins in which a run says why it stopped
NOT_COMPARED = ("_s", "per_s", "retries", "incarnation")  # what a clock, a retry or a new process put into a line
LOADED = ("weight_bytes", "embedding_bytes", "embedding_bytes_per_image")  # what a process got for the first time


class Interrupted(Exception):
    """The campaign is to end, so nothing is started any more."""


class Running:
    """The command `train` on one configuration: started, followed, and started again in the same way."""

    def __init__(
        self,
        output: Path,
        overrides: Sequence[str],
        env: Mapping[str, str],
        logs: Path,
        before: Sequence[str],
        interrupted: threading.Event,
    ) -> None:
        """output: the folder of runs, of which this one is NAME. logs: a folder for what is printed.

        before: what is to stand before the command. interrupted: set once nothing is to be started any more.
        """
        self.output, self.folder, self.env, self.logs = output, output / NAME, dict(env), logs
        own = [f"output={output}", f"name={NAME}", "resume=auto"]
        self.command = [*before, sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *overrides, *own]
        self.steps, self.starts = Steps(self.folder / "metrics.jsonl"), 0
        self.process: subprocess.Popen[bytes] | None = None
        self.interrupted = interrupted
        self.family = Family(0, "")

    def start(self) -> None:
        """Give the command. Raises Interrupted."""
        self.check()
        self.starts += 1
        with self._log("out").open("wb") as out, self._log("err").open("wb") as err:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
        self.family = Family(self.process.pid, str(self.output.parent))

    def check(self) -> None:
        """Raises Interrupted."""
        if self.interrupted.is_set():
            raise Interrupted

    def code(self) -> int | None:
        """The driver's exit code; None while it runs."""
        return self.process.poll() if self.process is not None else None

    def said(self) -> list[str]:
        """The lines that this start of it has printed to stderr, without what Ray says by the way of lost objects."""
        lines = self._log("err").read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip() and ":info_message:" not in line]

    def printed(self) -> str:
        """All that this start of it has printed, for people who look for what went wrong."""
        return self._log("out").read_text(errors="replace") + self._log("err").read_text(errors="replace")

    def _log(self, what: str) -> Path:
        return self.logs / f"{self.starts:02}.{what}"

    def phase(self) -> str:
        """What status.json says that the driver does; it may be a second old."""
        with suppress(OSError, ValueError):
            return str(json.loads((self.folder / "status.json").read_text())["phase"])
        return ""

    def partial(self) -> list[Path]:
        """The files of a checkpoint that is being written."""
        return list((self.folder / "checkpoints").glob("step_*.partial/*"))

    def result(self) -> Result:
        """Of a run that has ended."""
        return Result.of(Run.open(self.folder))


class Steps:
    """Counts the steps in metrics.jsonl: those that are there, and all that were ever seen to come."""

    def __init__(self, file: Path) -> None:
        self.file, self.done, self.seen = file, 0, 0

    def look(self) -> int:
        """Read the file; return how many steps came since the first look, those that were done again too."""
        with suppress(OSError):
            text = self.file.read_bytes()
            done = text[: text.rfind(b"\n") + 1].count(b'"kind": "train"')
            self.seen += max(0, done - self.done)
            self.done = done
        return self.seen


class Result:
    """What must be the same whatever happened: the digest of the weights, and each line of metrics.jsonl but times."""

    def __init__(self, digest: str, lines: list[dict[str, Any]]) -> None:
        self.digest, self.lines = digest, lines

    @classmethod
    def of(cls, run: Run) -> Result:
        digest = json.loads((run.folder / "summary.json").read_text())["weights_sha256"]
        return cls(str(digest), [compared(line) for line in run.metrics() if line["kind"] != "judge"])

    def differs(self, other: Result) -> str:
        """How `other` differs, in words; nothing where it does not."""
        for mine, its in zip(self.lines, other.lines, strict=False):
            if mine != its:
                keys = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
                return f"step {mine['step']} differs in {', '.join(keys[:4])}"
        if len(self.lines) != len(other.lines):
            return f"{len(other.lines)} lines of metrics for {len(self.lines)}"
        return "" if self.digest == other.digest else "another digest of the weights"


def compared(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in line.items()
        if not key.endswith(NOT_COMPARED) and not key.startswith(WAITED) and key not in LOADED
    }


def fault_of_stop(code: int, said: Sequence[str], names: str) -> tuple[str, str]:
    """Whether a run stopped as it should: what is wrong ("" for nothing), and the line that it stopped with.

    It should say one line, which begins with OURS and matches `names`, and nothing else; and end with 1, 2 or 130.
    """
    lines = [line.removeprefix(OURS) for line in said if line.startswith(OURS)]
    line = lines[-1] if lines else (said[-1] if said else "")
    if any(line.startswith("Traceback") for line in said):
        return "a traceback", said[-1]
    if code not in (1, 2, 130):
        return f"exit code {code}", line
    if not lines:
        return "no line", line
    if len(said) > 1:
        return "more than one line", line
    return ("" if re.search(names, line, re.IGNORECASE) else "the line does not name the cause"), line


def environment(work: Path, temporary: Path) -> dict[str, str]:
    """That of a user. work: all runs share a cache there. temporary: for what a run leaves outside of its folder."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "FLOWBP_"))}
    return ours | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TMPDIR": str(temporary),
        "TMPDIR": str(temporary),
        "FLOWBP_RAY_CACHE": str(work / "cache"),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE),
        "RAY_worker_niceness": "0",
    }


STORE = 150_000_000  # bytes of a run's object store
