"""Samples of which is known what grows, to verdicts and the page's section."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.soak.__main__ import read_samples, write_samples
from tests.soak.campaign import LOOK, Record, Sample
from tests.soak.processes import Process, files_below, look, ports, shared_memory, still_there
from tests.soak.raylet import Store
from tests.soak.run import Kill, last_step
from tests.soak.section import section
from tests.soak.verdicts import figures, leaked

KILLS = [
    Kill(20.0 * (1 + i), role, f"ray::{role}", 40 * (1 + i), 4.0 + i) for i, role in enumerate(("sampler", "learner"))
]


def record(
    leak: float = 0.0,
    zombie: bool = False,
    store: tuple[float, float] = (0.0, 0.0),
    mark: tuple[int, float] = (999, 0.0),
) -> Record:
    """Ten minutes of two steps a second. leak: MiB that the driver keeps of a step. The sampler is killed once.

    store: MiB that the object store holds more in the last fifth, and MiB that stay in it of each step. mark: from
    which sample on there are 20 MiB more of shared memory, and MiB that stay there of each step.
    """
    samples = []
    for number in range(120):
        steps, wave = 2 * LOOK * number, number % 5
        shared = {(1, 2): 2**21 + int(2**20 * (20 * (number >= mark[0]) + mark[1] * steps))}
        sampler = 11 if number < 60 else 12
        processes = [
            Process(10, 0.0, "driver", 400 + leak * steps + wave, 30, 40 + wave % 2, frozenset({"1", "2"}), shared),
            Process(sampler, float(sampler), "sampler", 300 + wave, 20, 30, shared=shared),
            Process(20, 0.0, "sampler", 0.0, 0, 0, zombie=True) if zombie else Process(20, 0.0, "GCS", 20.0, 9, 9),
        ]
        held = Store(8.0 + wave + store[0] * (number >= 96) + store[1] * steps, 12, {10: 15})
        samples.append(Sample(number * LOOK, int(steps), number // 4, processes, held, 3, 80 + 5 * (number // 4), 12))
    return Record(600.0, samples, [*KILLS, Kill(60.0, "reward server", "ray::RewardActor.score", 120)])


def test_what_is_flat_and_what_grows() -> None:
    found = figures(record())
    assert found["faults"] == [] and {row["verdict"] for row in found["rows"]} == {"flat"}
    assert found["kills"] == {"sampler": 1, "reward server": 1, "learner": 1} and found["steps"] == 1190
    assert found["recovered"] == {"median": 4.5, "worst": 5.0}
    shared = next(row for row in found["rows"] if row["quantity"] == "shared memory")
    logs = next(row for row in found["rows"] if row["quantity"] == "files of Ray's session")
    assert (logs["slope"], logs["verdict"]) == (5.0, "flat")
    assert shared["level"] == 2.0  # the same file, open in two processes
    grown = figures(record(leak=0.02))
    assert [row["of"] for row in grown["rows"] if row["verdict"] == "grows"] == ["driver"]
    [fault] = grown["faults"]
    assert fault.startswith("driver: memory grows by 2") and abs(float(fault.split()[4]) - 20) < 1
    brief = record(leak=0.01)
    brief.samples = brief.samples[-20:]  # 2 MiB in all
    assert figures(brief)["faults"] == []
    assert figures(record(leak=0.001))["faults"] == []  # 1 MiB in 1,000 steps is below what is stated


def test_more_at_once_in_the_quiet_end_is_no_growth() -> None:
    """What stays of each step is found beside it."""

    def of_store(more: float, leak: float) -> dict[str, Any]:
        return next(r for r in figures(record(store=(more, leak)))["rows"] if r["quantity"] == "object store")

    for more in (0.0, 25.0):
        quiet, leaking = of_store(more, 0.0), of_store(more, 0.02)
        assert quiet["verdict"] == "flat" and abs(quiet["slope"]) < 1
        assert leaking["verdict"] == "grows" and abs(leaking["slope"] - 20) < 1


def test_shared_memory_is_a_high_water_mark() -> None:
    """One step of it is no growth; one that goes on is, beside such a step too."""

    def of_memory(step: int, leak: float) -> dict[str, Any]:
        return next(r for r in figures(record(mark=(step, leak)))["rows"] if r["quantity"] == "shared memory")

    for step in (999, 40):  # never, and after a third of the time
        assert of_memory(step, 0.0)["verdict"] == "flat" and of_memory(step, 0.0)["slope"] == 0
        leaking = of_memory(step, 0.02)
        assert leaking["verdict"] == "grows" and abs(leaking["slope"] - 20) < 0.1
    assert of_memory(80, 0.0)["verdict"] == "grows"  # late ones cannot be told apart


def test_samples_that_were_written_give_the_same_figures(tmp_path: Path) -> None:
    made = record(leak=0.02)
    made.faults = ["something"]
    write_samples(tmp_path / "samples", made)
    again, found = figures(read_samples(tmp_path / "samples")), figures(made)
    assert again["faults"] == found["faults"] and again["recovered"] == found["recovered"]
    for new, old in zip(again["rows"], found["rows"], strict=True):
        assert new == old or new["quantity"] == "shared memory"  # which files it is in is not written


def test_processes_that_stay_are_leaks() -> None:
    assert leaked(record().samples) == []
    assert leaked(record(zombie=True).samples) == ["process 20 has ended and was not asked about it for 595 s"]
    both = [
        Sample(s.seconds, s.steps, 0, [*s.processes, Process(99, 0.0, "sampler", 1.0, 1, 1)], None, 0, 0, 0)
        for s in record().samples[:10]
    ]
    assert leaked(both) == ["two processes of the sampler at once for 45 s"]
    assert leaked(both[:5]) == []  # one that goes and one that comes


def test_the_section_has_every_quantity_once() -> None:
    text = section({"name": "soak", "date": "2026-01-02", **figures(record(leak=0.02))})
    lines = text.splitlines()
    assert lines[0] == "## Soak" and text.endswith("\n") and max(map(len, lines)) <= 120
    [driver] = [line for line in lines if line.startswith("| driver |")]
    assert driver.count("|") == 7 and "(+20." in driver and driver.endswith("| 15 (+0.0 ± 0.0) |")
    [gcs] = [line for line in lines if line.startswith("| GCS |")]
    assert gcs.endswith("| – |")
    assert "Growing: driver: memory." in text and "sampler 1, reward server 1, learner 1" in text.replace("\n", " ")


def test_a_process_is_seen_as_psutil_sees_it(tmp_path: Path) -> None:
    """A child with a file in shared memory, a port, and memory that it touched."""
    code = "\n".join(
        [
            "import os, socket, tempfile",
            "block = bytearray(b'x' * 2**25)",
            "shm = os.memfd_create('test'); os.write(shm, b'x' * 2**20)",
            "server = socket.create_server(('127.0.0.1', 0))",
            "print(server.getsockname()[1], flush=True); input()",
        ]
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin and child.stdout and int(child.stdout.readline()) > 0
        seen = look(child.pid)
        own = psutil.Process(child.pid)
        [process] = seen
        assert process.role == "driver" and (process.threads, process.files) == (own.num_threads(), own.num_fds())
        assert abs(process.memory - own.memory_full_info().uss / 2**20) < 1 and process.memory > 32
        assert process.sockets == 1 and ports(seen) == 1 and abs(shared_memory(seen) - 1) < 0.1
        assert still_there([own], 0.1) == [own]
        child.stdin.write("\n")
        child.stdin.flush()
        assert still_there([own], 20) == []
    assert look(child.pid) == []


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_step(file) == 0
    file.write_text('{"step": 0, "kind": "train"}\n{"step": 1, "kind": "train"}\n{"st')
    assert last_step(file) == 2 and files_below(tmp_path) == 1
