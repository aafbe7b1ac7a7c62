"""Trouble at a chosen moment of a run: what a test does to the processes while the loop goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from actors.gang import Gang
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
def during(method: str, turn: int, delay: float, action: Callable[[Gang], None]) -> Iterator[list[int]]:
    """Call `action` with the gang once, `delay` seconds after the gang's `method` was called for the turn-th time."""
    original, called = getattr(Gang, method), []
    turns = [0]

    def patched(self: Gang, *arguments: Any) -> Any:
        turns[0] += 1
        if turns[0] == turn:
            called.append(turn)
            threading.Timer(delay, action, [self]).start()
        return original(self, *arguments)

    setattr(Gang, method, patched)
    try:
        yield called
    finally:
        setattr(Gang, method, original)


def send(actor: Any, number: signal.Signals) -> int:
    """Send a signal to an actor's process on this machine; returns its pid."""
    pid: int = ray.get(actor.pid.remote())
    os.kill(pid, number)
    return pid


def kill_pools(loop: Loop) -> None:
    """SIGKILL the first sampler and the first reward server, a moment apart."""
    for pool in (loop.fleet.pipeline.samplers, loop.fleet.pipeline.scorers):
        send(pool.handles[0], signal.SIGKILL)
        time.sleep(0.5)
