"""Signals and closed terminals, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from flowbp_ray.utils.console import Lasting

CATCHES = """
import os, signal, sys
from flowbp_ray.utils import signals
from flowbp_ray.utils.signals import Interrupts
number = int(sys.argv[1])
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2] == "nohup" else signal.SIG_DFL)
os.close(2)
with Interrupts() as interrupts:
    os.kill(os.getpid(), number)
    print("asked", interrupts.asked)
    signals.SAME = 1e9
    os.kill(os.getpid(), number)
    signals.SAME = 0.0
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        print("at once")
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_once_asks_and_twice_ends_also_without_a_terminal(number: str) -> None:
    command = [sys.executable, "-c", CATCHES, str(int(signal.Signals[number])), ""]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "asked True\nat once\n"


def test_under_nohup_a_closed_terminal_asks_nothing() -> None:
    command = [sys.executable, "-c", CATCHES, str(int(signal.SIGHUP)), "nohup"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "asked False\n"


def test_a_reader_that_goes_away_only_silences_the_printing() -> None:
    reading, writing = os.pipe()
    stream = Lasting(os.fdopen(writing, "w"))
    console = Console(file=stream)
    console.print("heard")
    assert os.read(reading, 100) == b"heard\n"
    os.close(reading)
    for _ in range(3):  # rich would end the process at the first
        console.print("lost")
        print("lost", file=stream, flush=True)
    with pytest.raises(BrokenPipeError):
        reading, writing = os.pipe()
        os.close(reading)
        print("without it", file=os.fdopen(writing, "w"), flush=True)
