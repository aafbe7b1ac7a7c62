"""A run in the foreground of a shell on a real terminal: Ctrl-C is typed, or the terminal is closed."""

from __future__ import annotations

import os
import pty
import select
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from flowbp_ray.run.folder import Run
from tests.driver.test_exact_restart import gone, lines_of
from tests.paths import ROOT
from tests.small import small_overrides

pytestmark = [pytest.mark.ray, pytest.mark.long]


PROMPT = "at your service> "


class Terminal:
    """An interactive bash on a terminal of its own. shown: what is on the screen."""

    def __init__(self) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            own = {"HISTFILE": "", "TERM": "xterm", "PS1": PROMPT}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, **own})
        self.shown, self.ended = bytearray(), threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.wait_for(PROMPT)  # what is typed before it may be lost

    def _read(self) -> None:
        while not self.ended.is_set():
            if select.select([self.handle], [], [], 0.1)[0]:
                with suppress(OSError):
                    self.shown += os.read(self.handle, 1 << 16)

    def type(self, keys: str) -> None:
        os.write(self.handle, keys.encode())

    def wait_for(self, text: str, timeout: float = 120.0) -> None:
        until = time.monotonic() + timeout
        while text.encode() not in self.shown:
            assert time.monotonic() < until, self.shown.decode(errors="replace")[-2000:]
            time.sleep(0.1)

    def close(self) -> None:
        """Close the window: the kernel tells the shell, and the shell its jobs."""
        if not self.ended.is_set():
            self.ended.set()
            self.reader.join()
            os.close(self.handle)


@contextmanager
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    try:
        yield opened
    finally:
        opened.close()
        with suppress(ChildProcessError):
            os.waitpid(opened.pid, 0)


def begin(opened: Terminal, tmp_path: Path) -> tuple[psutil.Process, list[psutil.Process], Path]:
    """Type the command; return the driver, all that it has started, and its folder, when two steps are logged."""
    settings = [*small_overrides(tmp_path), "name=mine", "steps=40", "resume=auto"]
    command = shlex.join([sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *settings])
    opened.type(f"cd {ROOT}; {command}; echo code=$?\n")
    folder, until = tmp_path / "mine", time.monotonic() + 240
    while lines_of(folder) < 2:
        assert time.monotonic() < until and psutil.pid_exists(opened.pid), opened.shown.decode(errors="replace")[-2000:]
        time.sleep(0.1)
    [driver] = psutil.Process(opened.pid).children()
    return driver, driver.children(recursive=True), folder


def saved(folder: Path) -> int:
    """The steps of a run that has stopped: its log is whole, and its checkpoint is of the last of them."""
    steps = [line["step"] for line in Run.open(folder).metrics()]
    assert steps == list(range(len(steps))) and 2 <= len(steps) < 40
    assert Run.open(folder).checkpoints.steps() == [len(steps)] and not (folder / "driver.json").exists()
    return len(steps)


def test_ctrl_c_is_typed(tmp_path: Path) -> None:
    with terminal() as opened:
        driver, others, folder = begin(opened, tmp_path)
        opened.type("\x03")
        opened.wait_for("code=130")
        opened.wait_for(f"stopped after step {saved(folder)}, saved in")
        assert len(others) >= 4 and gone([driver, *others])


def test_the_terminal_is_closed(tmp_path: Path) -> None:
    with terminal() as opened:
        driver, others, folder = begin(opened, tmp_path)
        opened.close()
        assert gone([driver]) and len(others) >= 4 and gone(others)
    saved(folder)
