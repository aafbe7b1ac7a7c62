"""Handling of Ctrl-C and SIGTERM: the first one finishes the step, saves and stops; the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(RuntimeError):
    """The run stopped on request, after saving; the message says how to resume it."""

    @classmethod
    def after(cls, step: int, folder: Path) -> Interrupted:
        """Build the exception of a run in `folder` with a checkpoint of `step`."""
        return cls(f"stopped after step {step}, saved in {folder}; name={folder.name} resume=auto goes on from there")


class Interrupts:
    """Catches SIGINT and SIGTERM inside the context; `asked` is set by the first one.

    Outside the main thread it catches nothing, because Python does not allow it.
    """

    def __init__(self) -> None:
        self.asked = self.entered = False
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
        return {number: signal.signal(number, self._caught) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nfinishing the step and saving; once more to stop at once\n")  # print is not reentrant
