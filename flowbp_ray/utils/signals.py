"""Ctrl-C: once means finish the step, save and leave; twice means leave at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(RuntimeError):
    """The run was asked to stop, and did after saving; the message says where it can go on."""

    @classmethod
    def after(cls, step: int, folder: Path) -> Interrupted:
        """What a run says whose checkpoint of `step` is in `folder`."""
        return cls(f"stopped after step {step}, saved in {folder}; name={folder.name} resume=auto goes on from there")


class Interrupts:
    """SIGINT and SIGTERM while it is entered. Outside the main thread nothing is caught: Python would not allow it."""

    def __init__(self) -> None:
        self.asked = self.entered = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self.entered = True
        self.before = self.arm()
        return self

    def arm(self) -> dict[int, Any]:
        """Catch the signals again, if entered: Ray takes SIGTERM for itself when it starts, and would abort."""
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
        os.write(2, b"\nfinishing the step and saving; once more to stop at once\n")  # print may not be re-entered
