"""What is said while something is waited for: in a job's log, on a terminal, and in status.json. No Ray."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from actors.queue_stats import QueueStats
from flowbp_ray.observability import progress, reader, status, status_view
from flowbp_ray.observability.phases import PhaseTimer
from flowbp_ray.observability.progress import Progress
from flowbp_ray.observability.reader import Reader
from flowbp_ray.run.folder import Run
from flowbp_ray.utils import tracing
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.signals import Interrupted
from tests.small import small_config


class Clock:
    """time.perf_counter by hand. cost: seconds that pass from one look at the thread's time to the next."""

    def __init__(self) -> None:
        self.now, self.spent, self.cost = 100.0, 0.0, 0.0

    def thread_time(self) -> float:
        self.spent += self.cost
        return self.spent

    def perf_counter(self) -> float:
        return self.now

    time = monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in ("flowbp_ray.observability.phases", "actors.queue_stats"):
        monkeypatch.setattr(f"{module}.time", made)
    return made


class Ticks:
    """Stands for the event that ends the ticking: after each of these actions the progress looks once."""

    def __init__(self, *actions: Any) -> None:
        self.left = list(actions)

    def wait(self, _: float) -> bool:
        if not self.left:
            return True
        self.left.pop(0)()
        return False


def test_a_job_log_says_what_is_waited_for_only_where_it_takes_long_and_then_rarely(
    tmp_path: Path, clock: Clock
) -> None:
    out = io.StringIO()
    shown = Progress(10, console=Console(file=out, width=200))
    shown.writer.open(tmp_path, {})
    shown.phase("sampling")
    shown.waiting("waiting for samplers: 0 of 4 pictures are there")

    def after(seconds: float) -> Any:
        def act() -> None:
            clock.now += seconds

        return act

    shown.ended = Ticks(*[after(10)] * 13)  # type: ignore[assignment]
    shown._tick()
    lines = out.getvalue().splitlines()
    assert lines == [f"sampling for {s} s; waiting for samplers: 0 of 4 pictures are there" for s in (40, 90)]
    written = status.read(tmp_path)
    assert written is not None and (written.phase, written.waiting) == ("sampling", shown.phases.waiting)
    shown.phase("learning")
    shown.phase("sampling")  # took 130 s once, so this is usual
    shown.ended = Ticks(*[after(10)] * 30)  # type: ignore[assignment]
    shown._tick()
    assert out.getvalue().splitlines() == lines
    shown.ended = Ticks(*[after(100)] * 2)  # type: ignore[assignment]
    shown._tick()
    assert out.getvalue().splitlines() == [*lines, "sampling for 400 s"]


def test_a_terminal_shows_it_below_the_bar(tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "name=watched")
    run, out = Run.create(config), io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress(2, console=console).begin(run.folder, config, "weights") as shown:
        shown.phase("learning")
        shown.waiting("waiting for learners 0, 1 (in step 3)")
        assert shown.live is not None
        shown.live.refresh()
        assert "waiting for learners 0, 1 (in step 3)" in out.getvalue()
        shown.phase("publishing")
        assert shown.phases.waiting == ""
    assert shown.live is None and shown.ticking is not None and not shown.ticking.is_alive()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "finished"),
        (RunFailed("learner 0 failed\nin step 3"), "failed: learner 0 failed"),
        (Interrupted("stopped after step 2"), "stopped: stopped after step 2"),
        (KeyboardInterrupt(), "stopped: KeyboardInterrupt"),
        (MemoryError(), "failed: MemoryError"),
    ],
)
def test_how_a_run_ended_is_in_its_folder(tmp_path: Path, error: BaseException | None, state: str) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "name=ended")
    run = Run.create(config)
    with Progress(2, quiet=True).begin(run.folder, config, "weights") as shown:
        seen = Reader(run.folder).snapshot()
        assert (seen.stage, seen.done, seen.steps) == ("running", 0, 2) and seen.state.startswith("starting for")
        shown.phase("sampling")
        try:
            if error is not None:
                raise error
        except BaseException as raised:
            shown.__exit__(type(raised), raised, None)
        else:
            shown.__exit__(None, None, None)
        found = Reader(run.folder).snapshot()
        assert (found.state, found.stage) == (state, "ended")


def test_phases_add_up_and_are_marks(clock: Clock) -> None:
    opened: list[str] = []

    class Span:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            opened.append(f"+{self.name}")

        def __exit__(self, *_: object) -> None:
            opened.append(f"-{self.name}")

    tracing.record_with(Span)
    try:
        phases = PhaseTimer()
        for name, seconds in (("sampling", 2.0), ("learning", 3.0), ("sampling", 4.0)):
            phases.enter(name)
            clock.now += seconds
        assert phases.elapsed() == 4.0 and phases.mean() == 2.0 and phases.lap("sampling") == 2.0
        phases.enter("")
    finally:
        tracing.record_with(None)
    assert phases.seconds == {"sampling": 6.0, "learning": 3.0}
    assert phases.lap("sampling") == 4.0 and phases.lap("saving") == 0.0
    assert opened == ["+sampling", "-sampling", "+learning", "-learning", "+sampling", "-sampling"]
    with tracing.span("nothing"):
        assert opened[-1] == "-sampling"


def test_the_queue_stats_name_who_is_waited_for_and_weighs_stages_by_time(clock: Clock) -> None:
    stages = ["queued", "rolling", "rolling", "done"]
    jobs = [SimpleNamespace(stage=stage, item=SimpleNamespace(rows=2), dropped=False) for stage in stages]
    samplers, servers = SimpleNamespace(name="sampler", silent=[1]), SimpleNamespace(name="reward server", silent=[])
    said: list[str] = []
    encoding = SimpleNamespace(complete=False, describe=lambda: "encoding prompts: 3 of 9")
    pipeline: Any = SimpleNamespace(jobs=jobs, samplers=samplers, scorers=servers, encoding=encoding)
    stats = QueueStats(said.append)
    stats.observe(pipeline, jobs)  # type: ignore[arg-type]
    assert said == [
        "waiting for samplers: 2 of 8 pictures are there; items: 1 queued, 2 rolling; no answer from sampler 1"
        "; encoding prompts: 3 of 9"
    ]
    clock.now += 3.0
    samplers.silent, encoding.complete = [], True
    for job in jobs[:3]:
        job.stage = "scoring"
    stats.observe(pipeline, jobs)  # type: ignore[arg-type]
    assert said[1] == "waiting for reward servers: 2 of 8 pictures are there; items: 3 being scored"
    stats.observe(pipeline, jobs)  # type: ignore[arg-type]
    assert len(said) == 2  # so soon it does not look again
    clock.now += 1.0
    means = stats.means()
    assert means == {
        "queue/queued": 0.75,
        "queue/rolling": 1.5,
        "queue/rolled": 0.0,
        "queue/scoring": 0.75,
        "queue/silent": 0.75,
    }
    clock.now += 2.0
    assert stats.means()["queue/scoring"] == 3.0


@pytest.mark.parametrize(("cost", "pause"), [(0.0, 0.1), (0.02, 2.0), (10.0, 5.0)])
def test_counts_take_a_hundredth_of_the_time_and_come_every_five_seconds(
    clock: Clock, cost: float, pause: float
) -> None:
    job = SimpleNamespace(stage="queued", item=SimpleNamespace(rows=2), dropped=False)
    pool = SimpleNamespace(name="sampler", silent=[])
    pipeline: Any = SimpleNamespace(jobs=[job], samplers=pool, scorers=pool, encoding=SimpleNamespace(complete=True))
    said: list[str] = []
    stats, clock.cost = QueueStats(said.append), cost
    for seconds, count in ((0.0, 1), (0.9 * pause, 1), (0.2 * pause, 2)):
        clock.now += seconds
        stats.observe(pipeline, [job])  # type: ignore[list-item]
        assert len(said) == count


def test_what_is_written_is_written_whole_and_not_without_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.TICK >= 1.0
    file, now = status.StatusFile(tmp_path), status.Status(phase="sampling", steps=3)
    file.write(now)
    first = (tmp_path / status.FILE).stat().st_ino
    file.write(now)
    assert (tmp_path / status.FILE).stat().st_ino == first and [p.name for p in tmp_path.iterdir()] == [status.FILE]
    monkeypatch.setattr(status, "BEAT", 0.0)
    file.write(now)
    assert (tmp_path / status.FILE).stat().st_ino != first
    status.StatusFile(tmp_path / "gone").write(now)  # a disk that refuses ends no run
    assert status.read(tmp_path / "gone") is None


def test_the_live_table_ends_when_a_run_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last sign is too old at the third look; a folder without any sign is looked at once."""
    run = Run.create(small_config(tmp_path, "flowbp_sparse"))
    status.StatusFile(run.folder).write(status.Status())
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        assert len(looks) < 3
        monkeypatch.setattr(reader, "SILENT_AFTER", reader.SILENT_AFTER if len(looks) == 1 else -1.0)

    monkeypatch.setattr(status_view.time, "sleep", wait)
    shown = Console(record=True, width=120, file=io.StringIO())
    status_view.print_status(str(run.folder), watch=True, console=shown)
    assert len(looks) == 2 and "silent for" in shown.export_text()
    (run.folder / "status.json").unlink()
    status_view.print_status(str(run.folder), watch=True, console=shown)
    assert len(looks) == 2 and "unknown: there is no status.json" in shown.export_text()
