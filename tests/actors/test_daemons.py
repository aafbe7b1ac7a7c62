"""What watches the daemons of a private Ray, on processes that stand for them; on Ray itself: tests/chaos."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RaySystemError

from actors.daemons import Watch, watched
from flowbp_ray.observability.progress import Progress
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from tests.small import small_config


@pytest.fixture
def two() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    started = {name: subprocess.Popen(["sleep", "60"]) for name in ("raylet", "GCS")}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["raylet", "GCS"])
def test_the_first_that_ends_is_named_at_once(two: dict[str, subprocess.Popen[bytes]], name: str) -> None:
    said, heard = list[tuple[str, int]](), threading.Event()

    def end(*who: object) -> None:
        said.append(who)  # type: ignore[arg-type]
        heard.set()

    with Watch({key: process.pid for key, process in two.items()}, end):
        two[name].kill()
        assert heard.wait(20)
    assert said == [(name, two[name].pid)]


def test_nothing_is_said_where_none_ends_and_where_there_is_none(two: dict[str, subprocess.Popen[bytes]]) -> None:
    said = list[object]()
    for pids in ({key: process.pid for key, process in two.items()}, {}):
        with Watch(pids, lambda *who: said.append(who)) as watch:
            assert watch.is_alive()
        assert not watch.is_alive()
    assert said == []


def test_an_error_of_ray_is_a_line_that_says_how_to_go_on(tmp_path: Path) -> None:
    run = Run.create(small_config(tmp_path, "flowbp_sparse", "name=mine"))
    said = pytest.raises(RunFailed, match=r"^Ray failed: RaySystemError: .*name=mine resume=auto goes on")
    with said as found, watched(run, Progress(1, quiet=True)):
        raise RaySystemError("the connection is broken\nand more")
    assert "\n" not in str(found.value)


def test_the_end_of_a_daemon_ends_the_process_with_a_line_and_records_it(tmp_path: Path) -> None:
    """In a process of its own, which would sleep for a minute otherwise."""
    program = f"""
import subprocess, time
from pathlib import Path
from actors import daemons
from flowbp_ray.observability.progress import Progress
from flowbp_ray.run.folder import Run
from tests.small import small_config

config = small_config(Path({str(tmp_path)!r}), "flowbp_sparse", "name=mine")
run, progress = Run.create(config), Progress(2)
sleeping = subprocess.Popen(["sleep", "60"])
daemons.daemons = lambda: {{"raylet": sleeping.pid}}
with run.locked(print), progress.begin(run.folder, config, "it"), daemons.watched(run, progress):
    run.keep()
    sleeping.kill()
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("flowbp-ray: the raylet of this run's Ray (process ")
    assert "name=mine resume=auto goes on" in line
    folder = tmp_path / "mine"
    assert not (folder / "driver.json").exists()
    assert (
        '"state": "failed"' in (folder / "status.json").read_text() and "the raylet" in (folder / "log.txt").read_text()
    )
