"""Trouble at a chosen moment of a run: what a test does to the processes while the loop goes on."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from actors.learner_group import LearnerGroup
from flowbp_ray.driver import Loop


@contextmanager
def before_step(step: int, action: Callable[[Loop], None]) -> Iterator[list[int]]:
    """Call `action` with the loop once, when it first comes to `step`; yields the steps it was called at."""
    original, called = Loop.step, []

    def patched(self: Loop, number: int) -> None:
        if number == step and not called:
            called.append(number)
            action(self)
        original(self, number)

    Loop.step = patched  # type: ignore[method-assign]
    try:
        yield called
    finally:
        Loop.step = original  # type: ignore[method-assign]


@contextmanager
def during(method: str, turn: int, delay: float, action: Callable[[LearnerGroup], None]) -> Iterator[list[int]]:
    """Call `action` with the group once, `delay` seconds after the group's `method` was called for the turn-th time."""
    original, called = getattr(LearnerGroup, method), []
    turns = [0]

    def patched(self: LearnerGroup, *arguments: Any) -> Any:
        turns[0] += 1
        if turns[0] == turn:
            called.append(turn)
            threading.Timer(delay, action, [self]).start()
        return original(self, *arguments)

    setattr(LearnerGroup, method, patched)
    try:
        yield called
    finally:
        setattr(LearnerGroup, method, original)


class Killer(threading.Thread):
    """SIGKILL at random moments, each time to a process that is in the call that is next in `calls`.

    Ray names a worker's process after its call, such as `ray::SleepySampler.rollout`. killed: the calls that were hit.
    """

    def __init__(self, calls: Sequence[str], seed: int = 0) -> None:
        super().__init__(daemon=True)
        self.left, self.killed, self.ended = list(calls), list[str](), threading.Event()
        self.random = random.Random(seed)

    def run(self) -> None:
        while self.left and not self.ended.wait(self.random.uniform(0.1, 0.6)):
            at_work = [p for p in psutil.Process().children(recursive=True) if self.left[0] in title(p)]
            if at_work:
                with suppress(ProcessLookupError):
                    os.kill(self.random.choice(at_work).pid, signal.SIGKILL)
                    self.killed.append(self.left.pop(0))

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
