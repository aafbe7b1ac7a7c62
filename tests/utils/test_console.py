"""Signals and closed terminals, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from flowbp_ray.utils.console import Lasting, guarded
from tests.paths import ROOT

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


def test_what_the_system_refuses_is_a_line_with_the_file_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(command: Callable[[], object]) -> str:
        with pytest.raises(SystemExit) as stop:
            guarded(command)
        assert stop.value.code == 2
        return capsys.readouterr().err

    missing, folder = tmp_path / "missing", tmp_path / "folder"
    folder.mkdir()
    line = f"flowbp-ray: {missing}: No such file or directory; see whether the path is right\n"
    assert refused(missing.read_text) == line
    assert refused(folder.read_text) == f"flowbp-ray: {folder}: Is a directory; write the name of a file\n"
    assert refused(folder.mkdir).startswith(f"flowbp-ray: {folder}: File exists; something of that name is in the way")
    long = tmp_path / ("n" * 300)
    said = refused(long.read_text)
    assert said.endswith("…: File name too long; write a shorter one\n") and len(said) < 300

    def fails() -> None:
        raise ConnectionError("no server answers at host:1")

    assert refused(fails) == "flowbp-ray: no server answers at host:1\n"


@pytest.mark.parametrize("command", [["-m", "flowbp_ray"], ["-c", "import flowbp_ray.__main__ as m; m.main()"]])
def test_a_folder_that_was_removed_under_the_shell_is_said(tmp_path: Path, command: list[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$PWD" && exec "$@"'
    python = [sys.executable, *command, "methods"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script, "sh", *python], cwd=gone, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].endswith("is not there any more; cd to another")
