"""Signals that end a run: the first one finishes the step, saves and stops; the second one stops at once.

They are Ctrl-C (SIGINT), SIGTERM, SIGHUP (a terminal that was closed), and SIGUSR1 and SIGUSR2, which schedulers send
ahead of a time limit. What comes within a second of the first one is part of it: a closed terminal sends SIGHUP twice
(bash to its jobs, and the kernel when bash ends), and so does `timeout` with its signal (to the process and its group).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(RuntimeError):
    """The run stopped on request, after saving; the message says how to resume it."""

    @classmethod
    def after(cls, step: int, folder: Path) -> Interrupted:
        """Build the exception of a run in `folder` with a checkpoint of `step`."""
        return cls(f"stopped after step {step}, saved in {folder}; name={folder.name} resume=auto goes on from there")


CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME = 1.0  # seconds after the first signal in which others count as the same request


class Interrupts:
    """Catches the signals in CAUGHT inside the context; `asked` is set by the first one.

    SIGHUP stays ignored where it was, as under nohup. Outside the main thread it catches nothing, because Python does
    not allow it.
    """

    def __init__(self) -> None:
        self.asked = self.entered = False
        self.since = 0.0  # when it was asked, by time.monotonic
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self.entered = True
        self.before = self.arm()
        return self

    def arm(self) -> dict[int, Any]:
        """Install the handlers, if entered; return the previous ones. Call it again after Ray has started.

        Ray installs its own handler of SIGTERM when it starts, which would abort.
        """
        if not self.entered or threading.current_thread() is not threading.main_thread():
            return {}
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in CAUGHT if not (ignored and number == signal.SIGHUP)]
        return {number: signal.signal(number, self._caught) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self.since < SAME:
                return
            raise KeyboardInterrupt
        self.asked, self.since = True, time.monotonic()
        with suppress(OSError):  # of a terminal that was closed
            os.write(2, b"\nfinishing the step and saving; once more to stop at once\n")  # print is not reentrant
