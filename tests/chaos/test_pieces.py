"""The campaign's own pieces, without Ray: what is planned, how a stop is judged, processes, the disk, the table."""

from __future__ import annotations

import _thread
import errno
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.chaos.campaign import RESUMED, SURVIVED, Campaign, Record, faults
from tests.chaos.configurations import CONFIGURATIONS, MEANING
from tests.chaos.disk import BLOCK, Disk, mountable
from tests.chaos.faults import BY_NAME, KINDS
from tests.chaos.planner import STEPS, Plan, plans
from tests.chaos.processes import Family, end, runs, send
from tests.chaos.running import Interrupted, Result, Running, Steps, fault_of_stop
from tests.chaos.section import section
from tests.reliability import write_section


def test_the_plan_has_every_fault_as_often_as_it_is_to_be() -> None:
    planned = plans(KINDS, seed=17)
    assert planned == plans(KINDS, seed=17) != plans(KINDS, seed=18)
    assert Counter(f.kind for p in planned for f in p.faults) == {kind.name: kind.times for kind in KINDS}
    assert sum(kind.times for kind in KINDS) >= 60
    for plan in planned:
        assert plan.config in CONFIGURATIONS and plan.config in MEANING
        steps = [fault.step for fault in plan.faults]
        assert steps == sorted(set(steps)) and steps[-1] <= STEPS - 3
        assert all(
            plan.config in BY_NAME[f.kind].configs and BY_NAME[f.kind].stalls is plan.stalls for f in plan.faults
        )
    few = [fault.kind for plan in plans(KINDS, seed=3, faults=10) for fault in plan.faults]
    assert len(few) == len(set(few)) == 10


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (1, ["flowbp-ray: the raylet has ended"], ""),
        (1, ["flowbp-ray: nothing moved"], "the line does not name the cause"),
        (1, [], "no line"),
        (1, ["[core_worker.cc] died", "flowbp-ray: the raylet has ended"], "more than one line"),
        (1, ["Traceback (most recent call last):", "RayError: the raylet has ended"], "a traceback"),
        (-6, ["flowbp-ray: the raylet has ended"], "exit code -6"),
    ],
)
def test_a_stop_is_one_line_that_names_the_cause(code: int, said: list[str], wrong: str) -> None:
    assert fault_of_stop(code, said, "raylet")[0] == wrong


def test_results_differ_in_words() -> None:
    one = Result("a", [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}])
    assert one.differs(Result("a", [*one.lines])) == ""
    assert one.differs(Result("b", one.lines)) == "another digest of the weights"
    assert one.differs(Result("a", [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.5}])) == "step 1 differs in loss"
    assert one.differs(Result("a", [*one.lines, one.lines[0]])) == "3 lines of metrics for 2"


def test_steps_that_are_done_again_are_counted_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    steps, line = Steps(file), '{"step": 0, "kind": "train"}\n'
    assert steps.look() == 0
    file.write_text(line * 3 + line[:-1])  # the last is torn
    assert (steps.look(), steps.done) == (3, 3)
    file.write_text(line)  # went back
    assert (steps.look(), steps.done) == (3, 1)
    file.write_text(line * 2)
    assert (steps.look(), steps.done) == (4, 2)


class Pretended(Campaign):
    """Runs that are only noted: what is at work at the same time, and in which order they began."""

    def __init__(self, work: Path, at_once: int) -> None:
        super().__init__(work, seed=17, say=lambda text: None)
        self.began, self.beside = list[int](), threading.Barrier(at_once, timeout=60)

    def go(self, plan: Plan) -> list[Record]:
        self.began.append(plan.number)
        self.beside.wait()
        if plan.number == 4:
            _thread.interrupt_main()
            assert self.interrupted.wait(60)
            raise Interrupted
        return [Record("x", plan.config, plan.number, 1)]


def test_runs_go_two_at_a_time_and_what_stands_still_goes_first(tmp_path: Path) -> None:
    campaign = Pretended(tmp_path, at_once=2)
    plans = [Plan(number, "one", number in (3, 5), ()) for number in (1, 2, 3, 5)]
    assert [record.run for record in campaign.run(plans, at_once=2)] == [1, 2, 3, 5]
    assert {*campaign.began[:2]} == {3, 5}


def test_an_interrupt_loses_the_runs_at_work_and_no_other(tmp_path: Path) -> None:
    campaign = Pretended(tmp_path, at_once=1)
    plans = [Plan(number, "one", False, ()) for number in (1, 2, 4, 6)]
    assert [record.run for record in campaign.run(plans, at_once=1)] == [1, 2]
    assert campaign.began == [1, 2, 4]
    run = Running(tmp_path, [], {}, tmp_path, [], campaign.interrupted)
    with pytest.raises(Interrupted):
        run.start()
    assert run.starts == 0


def test_a_family_keeps_who_outlives_its_parent() -> None:
    """A child of a child, in a session of its own; its parent is killed, and it is found and ended."""
    inner = "import subprocess, sys; p = subprocess.Popen(['sleep', '60'], start_new_session=True); print(p.pid); " \
            "sys.stdout.flush(); p.wait()"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        family = Family(parent.pid, "")
        family.look(at_once=True)
        assert {pid for pid, _ in family.alive()} == {parent.pid, child}
        [sleeping] = family.doing("sleep")
        assert sleeping[0] == child and family.named("import subprocess") == [(parent.pid, family.seen[parent.pid])]
        parent.kill()
    assert family.alive() == [sleeping]
    end([sleeping])
    assert family.alive() == [] and not runs(sleeping)
    assert not send(sleeping, signal.SIGKILL) and not send((os.getpid(), 0), signal.SIGKILL)  # another process


@pytest.mark.skipif(not mountable(), reason="mounts a disk of its own, as root")
def test_a_disk_becomes_full_and_read_only_and_is_taken_away(tmp_path: Path) -> None:
    folder, run = tmp_path / "disk", tmp_path / "disk" / "run"
    with Disk(folder) as disk:
        run.mkdir()
        with (run / "log").open("wb", buffering=0) as log:
            log.write(b"a line\n")
            disk.fill()
            log.write(b"another, in the same page\n")
            with pytest.raises(OSError, match="No space left") as full:
                log.write(bytes(BLOCK))
                log.write(bytes(BLOCK))
            assert full.value.errno == errno.ENOSPC
            disk.empty()
            (run / "file").write_bytes(bytes(100 * BLOCK))
            disk.freeze(run)
            with pytest.raises(OSError, match="Read-only"):
                (run / "other").touch()
            assert (run / "file").stat().st_size == 100 * BLOCK
            disk.thaw()
            (run / "other").touch()
    assert not os.path.ismount(folder) and not list(folder.iterdir())


def test_the_table_says_what_the_records_say(tmp_path: Path) -> None:
    name, page = KINDS[0].name, tmp_path / "page.md"
    records = [
        Record(name, "one", 1, 3, "x", outcome=SURVIVED, seconds=2.0),
        Record(name, "one", 1, 5, "x", outcome=RESUMED, line="the line", seconds=10.0),
        Record(name, "two", 2, 7, "x", outcome=SURVIVED, seconds=99.0, differs="step 9 differs in loss"),
        Record(name, "two", 2, 9, outcome="not injected: the run had ended"),
    ]
    assert faults(records) == [records[2]]
    figures = {"date": "2026-01-01", "seed": 17, "minutes": 3.2, "runs": 4, "starts": 5}
    text = section({**figures, "records": [asdict(record) for record in records]})
    assert (
        f"| {name} | 3 of 4 | 1 | 1 | 1 | 6.0 | 10.0 |" in text and "| all | 3 of 4 | 1 | 1 | 1 | 6.0 | 10.0 |" in text
    )
    assert (
        "3 of 4 planned faults were injected\ninto 2 runs" in text
        and "after step 7: survived; step 9 differs in loss" in text
    )
    page.write_text("# A page\n\n<!-- chaos -->\nold\n<!-- /chaos -->\nafter it\n")
    write_section(page, "chaos", text)
    write_section(page, "more", "more\n")
    assert page.read_text() == (
        f"# A page\n\n<!-- chaos -->\n{text}<!-- /chaos -->\nafter it\n\n<!-- more -->\nmore\n<!-- /more -->\n"
    )
