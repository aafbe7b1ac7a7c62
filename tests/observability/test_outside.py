"""A real run from outside: Prometheus, `ray timeline`, and `flowbp-ray status` while it goes on and once killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from flowbp_ray.control import scaling
from flowbp_ray.observability import reader, status, status_view
from flowbp_ray.observability.catalog import TABLE, find
from flowbp_ray.run.folder import Run
from tests.test_cli import call

pytestmark = pytest.mark.ray
Seen = tuple[Path, dict[str, str]]  # a run's folder, and its table while it went on
SAMPLE = re.compile(r"^(ray_flowbp_ray_\w+)\{(.*)\} (\S+)$")


def table(folder: Path) -> dict[str, str]:
    return dict(status_view.rows(reader.Reader(folder).snapshot()))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The folder of a run that was killed, and its table while it went on."""
    folder = tmp_path_factory.mktemp("runs")
    with (folder / "out.txt").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.observability.running", str(folder)], stdout=out, stderr=out
        )
    run, until = folder / "seen", time.monotonic() + 240
    while not (run / "timeline.json").is_file() or (found := status.read(run)) is None or found.step <= 2:
        assert process.poll() is None and time.monotonic() < until, (folder / "out.txt").read_text()
        time.sleep(0.2)
    going = table(run)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()
    yield run, going


def line_of(run: Path, step: int) -> dict[str, Any]:
    [line] = [line for line in Run.open(run).metrics() if line["kind"] == "train" and line["step"] == step]
    return line


NOT_HERE = {"gate", "unscored", "nft_alike", "nft_unscored", "nft_loss", "old_distance"}
"""Of judges and of terms without gradient, which this run has none of."""


def test_every_name_of_the_table_is_scraped_with_the_runs_tag_and_the_logged_value(seen: Seen) -> None:
    run, line = seen[0], line_of(seen[0], 1)
    samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for text in (run / "scraped.txt").read_text().splitlines():
        if match := SAMPLE.match(text):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            assert tags["run"] == "seen"
            ours = frozenset((k, v) for k, v in tags.items() if k in ("role", "stage", "reward", "pair"))
            samples.setdefault(match[1], {})[ours] = float(match[3])
    assert samples.keys() == {metric.scraped for metric in TABLE if metric.stem not in NOT_HERE}
    for key, value in line.items():
        metric = find(key)
        if metric is not None and value is not None:
            tags = frozenset((tag, key.partition("/")[2]) for tag in metric.tags)
            assert samples[metric.scraped][tags] == value, key


def test_a_line_has_nothing_that_the_table_does_not_know(seen: Seen) -> None:
    line = line_of(seen[0], 1)
    assert [key for key in line if key != "kind" and find(key) is None] == []
    assert all(0 <= line[f"idle/{role}"] <= 1 for role in ("samplers", "rewards", "learners"))
    assert line["count/learners"] == 1 and line["evaluate_s"] > 0 < line["save_s"]
    assert line["queue/rolling"] + line["queue/scoring"] > 0


def test_the_timeline_has_the_drivers_phases_and_what_actors_do(seen: Seen) -> None:
    events = json.loads((seen[0] / "timeline.json").read_text())
    marks = Counter((e["tid"].split(":")[0], e["name"]) for e in events if e["cat"].startswith("flowbp_ray"))
    for phase in ("sampling", "learning", "publishing", "evaluating", "saving"):
        assert marks["driver", phase] >= 1, phase  # one that has not ended is not there
    for work in ("rollout", "load weights", "score", "sweep", "optimizer step", "publish", "save"):
        assert marks["worker", work] >= 2, work
    assert all(e["dur"] > 0 for e in events if e["cat"].startswith("flowbp_ray"))


def test_status_of_a_run_that_goes_on_and_of_one_that_was_killed(
    seen: Seen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, going = seen
    assert re.match(r"(sampling|learning|publishing|evaluating|saving) for \d+ s", going["state"])
    assert re.match(r"\d+ of 1000, .* images/s, .* a step, about .* left", going["step"])
    assert going["processes"] == "samplers 1, rewards 1, learners 1"
    assert "shapes_clip_heldout" in going["rewards"] and "since the start" in going["rewards"]
    assert going["evaluated"].startswith("after step ") and going["checkpoint"].startswith("step ")
    assert {"idle", "queue", "drift", "phases", "trouble"} <= going.keys()
    copy = Path(shutil.copytree(run, tmp_path / "seen"))
    scaling.request(Run.open(copy), {"samplers": 3})
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('3\n[]\n{"step": 7}\n{"step": 9, "kind": "tra')
    (copy / "log.txt").write_text("1 INFO fine\n2 WARNING reward server 0 died\n3 ERROR \xff bad [bold]\n", "latin-1")
    monkeypatch.setattr(reader, "SILENT_AFTER", -1.0)
    assert call("status", str(copy), "--once") == 0
    printed = capsys.readouterr().out
    assert "silent for" in printed and "about" not in printed
    assert "samplers 1, rewards 1, learners 1; asked for: samplers 3" in printed
    assert "WARNING reward server 0 died" in printed and "bad [bold]" in printed and "INFO" not in printed
    for torn in ("", "{", "[1]", '{"step": "x"}'):
        (copy / "status.json").write_text(torn)
        assert table(copy)["state"] == "unknown: there is no status.json"
    assert call("status", str(copy)) == 0


def test_the_live_table_ends_when_the_run_does(seen: Seen, tmp_path: Path) -> None:
    """Watching: the run ends between two looks."""
    copy = Path(shutil.copytree(seen[0], tmp_path / "seen"))
    known = status.read(copy)
    assert known is not None
    known.written = known.since = time.time()
    known.state = "running"
    status.StatusFile(copy).write(known)
    console = Console(record=True, force_terminal=True, width=120, file=(tmp_path / "terminal").open("w"))

    def end(_: float) -> None:
        known.state, known.why = "failed", "learner 0 failed in step 3: no memory"
        status.StatusFile(copy).write(known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status_view.time, "sleep", end)
        status_view.print_status(str(copy), watch=True, console=console)
    assert "failed: learner 0 failed in step 3: no memory" in console.export_text()
    assert os.path.getsize(tmp_path / "terminal") > 0
