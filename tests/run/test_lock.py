"""One driver in a run's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.run import environment
from flowbp_ray.run.folder import Run
from flowbp_ray.run.lock import FILE, RunLock, started
from flowbp_ray.utils.errors import ConfigError, RunFailed
from tests.small import small_config


def written(folder: Path, **changed: Any) -> None:
    """The lock of another driver: this process's own, changed."""
    lock = RunLock(folder, print)
    (folder / FILE).write_text(json.dumps({**lock.ours, "host": "elsewhere", **changed}))


def test_a_second_driver_is_refused_in_one_line_and_the_lock_goes_with_the_first(tmp_path: Path) -> None:
    with RunLock(tmp_path, print):
        with pytest.raises(ConfigError, match=r"is running already, in process .*; wait for it, end it, or") as caught:
            RunLock(tmp_path, print).__enter__()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with RunLock(tmp_path, print):
        pass


def test_the_lock_of_a_dead_process_is_taken_over_and_said_so(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    when = started(ended.pid)
    assert when is None or when > 0
    ended.wait()
    said: list[str] = []
    for changed in ({"pid": ended.pid, "started": when}, {"started": 5}):  # the second: a pid that was used again
        written(tmp_path, **changed)
        with RunLock(tmp_path, said.append) as lock:
            assert json.loads((tmp_path / FILE).read_text())["token"] == lock.ours["token"]
    assert len(said) == 2 and all("on elsewhere, which is gone" in line for line in said)
    (tmp_path / FILE).write_text("{torn")
    with RunLock(tmp_path, said.append, beat=0.01, patience=0.05):
        assert len(said) == 3


def test_on_another_machine_only_the_count_tells(tmp_path: Path) -> None:
    said: list[str] = []
    written(tmp_path, machine="another")
    with RunLock(tmp_path, said.append, beat=0.02, patience=0.1):
        assert len(said) == 1
    written(tmp_path, machine="another")
    beating = threading.Timer(0.1, written, (tmp_path,), {"machine": "another", "beat": 1, "token": "other"})
    beating.start()
    with pytest.raises(ConfigError, match="running already"):
        RunLock(tmp_path, said.append, beat=0.02, patience=30).__enter__()
    beating.join()


def test_who_lost_the_lock_saves_nothing_more(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, print, beat=0.01)
    with lock:
        lock.check()
        written(tmp_path, token="another")
        lock.beating.join(0.5)
        with pytest.raises(RunFailed, match="another driver has taken"):
            lock.check()
    assert json.loads((tmp_path / FILE).read_text())["token"] == "another"


def test_who_comes_back_when_the_other_has_ended_saves_nothing_more(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, print, beat=60)
    with lock:
        lock.check()
        (tmp_path / FILE).unlink()
        with pytest.raises(RunFailed, match="another driver has taken"):
            lock.check()


def test_a_second_driver_changes_nothing_that_the_first_writes(tmp_path: Path) -> None:
    config = small_config(tmp_path, "refl", "name=mine", "resume=auto")
    first = Run.create(config)
    with first.locked(print):
        first.keep()
        partial = first.checkpoints.begin(1)
        (partial / "weights.safetensors").write_bytes(b"half")
        starts = (first.folder / environment.FILE).read_text()
        with pytest.raises(ConfigError, match="running already"), Run.resume(config).locked(print):
            pass
        assert (partial / "weights.safetensors").read_bytes() == b"half"
        assert (first.folder / environment.FILE).read_text() == starts
    with Run.resume(config).locked(print):
        assert not partial.exists()


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    config = small_config(tmp_path, "refl", "name=mine")
    run = Run.create(config)
    with pytest.raises(ValueError, match="no room"), run.locked(print):
        raise ValueError("no room")
    assert not list(tmp_path.iterdir())
    again = Run.create(config)
    with pytest.raises(ValueError, match="later"), again.locked(print):
        again.keep()
        raise ValueError("later")
    assert again.folder.name == "mine" and "later" in (again.folder / "log.txt").read_text()
    resumed = Run.resume(config)
    with pytest.raises(ValueError, match="no room"), resumed.locked(print):
        raise ValueError("no room")
    assert (resumed.folder / "config.yaml").is_file()


def test_a_disk_that_does_not_take_a_file_ends_the_run_with_a_line(tmp_path: Path) -> None:
    """And what says so does not need the disk: /dev/full (full(4)) refuses every byte."""
    run = Run.create(small_config(tmp_path, "refl", "name=mine"))
    run.keep()
    (run.folder / "log.txt").symlink_to("/dev/full")
    (run.folder / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(run.folder, run.config)
    with (
        pytest.raises(
            RunFailed, match=r"metrics.jsonl cannot be written \(No space left on device\); .*resume=auto"
        ) as it,
        run.locked(print),
        closing(tracker),
    ):
        run.logger().info("a line that is lost")
        tracker.log(0, "train", {"loss": 1.0})
    assert "\n" not in str(it.value)


def test_other_errors_of_files_stay_what_they_are(tmp_path: Path) -> None:
    run = Run.create(small_config(tmp_path, "refl", "name=mine"))
    with pytest.raises(FileNotFoundError), run.locked(print):
        (tmp_path / "none").read_text()
