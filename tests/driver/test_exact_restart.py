"""Stop, kill, stall and go on: the weights and the log are those of the undisturbed run."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from flowbp_ray import driver
from flowbp_ray.config import loading
from flowbp_ray.driver import Loop
from flowbp_ray.observability.reader import Reader
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from tests.driver.chaos import before_step, during
from tests.driver.faulty import SAMPLERS, HangingSampler, instead
from tests.small import WAITED, local_digest, small_config, small_overrides

pytestmark = pytest.mark.ray
long = pytest.mark.long

TIMED = ("_s", "per_s", "retries", "incarnation")
LOADED = ("weight_bytes", "embedding_bytes")  # what reached a process for the first time
FULL = ["learners.ema.decay=0.9", "learners.optimizer.schedule={name: cosine, warmup: 1}"]
EVALUATED = ["evaluation.prompts=shapes:dev", "evaluation.limit=4", "evaluation.every=2", "evaluation.pictures=4"]
ZERO2 = ["learners.engine=deepspeed", "learners.count=2", "learners.zero=2"]
LORA = ["learners.lora={rank: 4, alpha: 8}"]
VERDICT = [
    "method=null",
    "rewards.terms=[{name: shapes_verifier, gradient: none}]",
    "data.prompts=shapes:train",
    "data.images_per_prompt=3",
    "nft.policy=average",
    "learners.ema={decay: 0.5, ramp: 0.2}",
]


class Crash(Exception):
    """Stands for whatever ends a driver without warning."""


def crash(_: Loop) -> None:
    raise Crash


Undisturbed = Callable[..., tuple[list[dict[str, Any]], str]]


@pytest.fixture(scope="module")
def undisturbed(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """overrides -> what is in the log and the digest of a run that nothing happens to, trained once."""

    @functools.cache
    def get(*overrides: str) -> tuple[list[dict[str, Any]], str]:
        folder = tmp_path_factory.mktemp("undisturbed")
        run, summary = driver.train(small_config(folder, "flowbp_bridge", *overrides))
        return facts(run), summary["weights_sha256"]

    return get


def facts(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock, a retry or a new process put there."""
    same = [key for line in run.metrics() for key in line if not key.endswith(TIMED) and not key.startswith(WAITED)]
    return [{k: v for k, v in line.items() if k in same and k not in LOADED} for line in run.metrics()]


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        pytest.param(1, ["staleness=0", *FULL], marks=long),
        (3, ["staleness=1", *FULL, *EVALUATED]),
        pytest.param(2, ["staleness=1", *LORA, *FULL], marks=long),
        pytest.param(3, ["staleness=1", *ZERO2, *FULL], marks=long),
    ],
    ids=["S=0, before any checkpoint", "S=1, evaluated", "S=1, LoRA", "S=1, ZeRO-2 on two ranks"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    undisturbed: Undisturbed, tmp_path: Path, stop: int, settings: list[str]
) -> None:
    shared = ["steps=4", "checkpoint.every=2", *settings]
    want, digest = undisturbed(*shared)
    config = small_config(tmp_path, "flowbp_bridge", *shared, "resume=auto", "name=stopped")
    with before_step(stop, crash), pytest.raises(Crash):
        driver.train(config)
    run, summary = driver.train(config)
    assert run.folder.name == "stopped" and summary["weights_sha256"] == digest
    assert facts(run) == want
    assert [line["step"] for line in want if line["kind"] == "train"] == [0, 1, 2, 3]


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "name=mine", "resume=auto")
    Run.create(config)
    assert Run.resume(config).folder.name == "mine"
    other = small_config(tmp_path, "flowbp_sparse", "name=mine", "resume=auto", "learners.optimizer.lr=3e-4")
    with pytest.raises(ValueError, match=r"another configuration; .*\n  learners.optimizer.lr was .*, is 0.0003$"):
        Run.resume(other)
    settings = ["seed=1", "plan_seed=1", "steps=9", "drift.meter=true", "backbone.num_steps=7"]
    many = small_config(tmp_path, "flowbp_sparse", "name=mine", *settings)
    with pytest.raises(ValueError, match="resume=never:\n") as refused:
        Run.resume(many)
    said = str(refused.value).splitlines()[1:]
    assert {line.split()[0] for line in said} == {setting.split("=")[0] for setting in settings}
    wider = small_config(tmp_path, "flowbp_sparse", "name=mine", "samplers.count=3", "rewards.count=2")
    assert Run.resume(wider).folder.name == "mine"


def strike_rank(rank: int, number: signal.Signals, pids: list[int]) -> Callable[[Any], None]:
    return lambda _group: os.kill(pids[rank], number)


@pytest.mark.parametrize(
    ("method", "turn", "number", "stall"),
    [
        pytest.param("step", 3, signal.SIGKILL, 240, marks=long),
        pytest.param("publish", 5, signal.SIGKILL, 240, marks=long),  # the fourth is the average's, for the checkpoint
        pytest.param("step", 3, signal.SIGSTOP, 15, marks=long),
    ],
    ids=["killed in a backward", "killed in a publish", "stalled in a backward"],
)
def test_a_lost_rank_is_replaced_from_the_last_checkpoint(
    undisturbed: Undisturbed, tmp_path: Path, method: str, turn: int, number: signal.Signals, stall: int
) -> None:
    """Step 2 (after the checkpoint of step 2) loses rank 1; the learners are built again, samplers and servers stay."""
    shared = ["steps=4", "checkpoint.every=2", "staleness=1", *ZERO2, *FULL]
    want, digest = undisturbed(*shared)
    config = small_config(tmp_path, "flowbp_bridge", *shared, "name=struck", f"cluster.stall_timeout={stall}")
    pids: list[int] = []
    samplers: list[list[int]] = []

    def note(loop: Loop) -> None:
        pids.extend(ray.get([rank.pid.remote() for rank in loop.fleet.learners.ranks]))
        samplers.append(ray.get([s.pid.remote() for s in loop.fleet.pipeline.samplers.handles]))

    def note_again(loop: Loop) -> None:
        samplers.append(ray.get([s.pid.remote() for s in loop.fleet.pipeline.samplers.handles]))

    moment = 0.05 if method == "step" else 0.0
    with before_step(2, note), before_step(3, note_again), during(method, turn, moment, strike_rank(1, number, pids)):
        run, summary = driver.train(config)
    assert summary["weights_sha256"] == digest
    assert facts(run) == want
    assert run.metrics()[-1]["incarnation"] == 1
    assert samplers[0] == samplers[1]  # the samplers stayed
    assert "building the learners again" in (run.folder / "log.txt").read_text()
    assert not psutil.pid_exists(pids[1]) or psutil.Process(pids[1]).status() == psutil.STATUS_ZOMBIE


def test_actors_that_stand_still_are_ended_and_their_work_is_done_again(local_ray: Any, tmp_path: Path) -> None:
    """The sampler, and two steps later the reward server, are stopped (SIGSTOP): nothing fails, nothing moves."""
    config = small_config(tmp_path, "flowbp_sparse", "steps=5", "cluster.stall_timeout=12")
    stopped: list[int] = []

    def stop(pool: str) -> Callable[[Loop], None]:
        def at(loop: Loop) -> None:
            for actor in getattr(loop.fleet.pipeline, pool).handles:
                stopped.append(ray.get(actor.pid.remote()))
                os.kill(stopped[-1], signal.SIGSTOP)

        return at

    with before_step(1, stop("samplers")), before_step(3, stop("scorers")):
        run, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)
    log = (run.folder / "log.txt").read_text()
    assert all(f"{name} 0 did not answer within 12 s" in log for name in ("sampler", "reward server"))
    assert len(stopped) == 2 and not any(map(alive, stopped))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@long
def test_work_that_does_not_move_is_dumped_and_ends_the_run(local_ray: Any, tmp_path: Path) -> None:
    """Every sampler stands still in step 1, also once it was started anew."""
    config = small_config(tmp_path, "flowbp_sparse", "steps=3", "cluster.stall_timeout=12")
    with (
        instead(*SAMPLERS, HangingSampler),
        pytest.raises(RunFailed, match=r"nothing moved for 12 s: items .*, busy \{'sampler': \[0\]\}"),
    ):
        driver.train(config)
    assert Reader(config.run_dir).snapshot().state.startswith("stalled: nothing moved for 12 s: items")
    state = json.loads((config.run_dir / "stalled.json").read_text())
    assert "rolling" in {item["stage"] for item in state["items"]}
    assert [line["step"] for line in Run.open(config.run_dir).metrics()] == [0]


def start(tmp_path: Path, *overrides: str) -> tuple[subprocess.Popen[str], Path]:
    """`flowbp-ray train` in a process of its own, as a user starts it; returns when two steps more are logged."""
    folder = tmp_path / "mine"
    before = lines_of(folder)
    command = [sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *small_overrides(tmp_path)]
    process = subprocess.Popen(
        [*command, "name=mine", "steps=40", "resume=auto", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 240
    while lines_of(folder) < before + 2:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.1)
    return process, folder


def lines_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process that the driver started, daemons and workers: they share its session or descend from it."""
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    """Within two minutes: after a SIGKILL Ray's agents look for their GCS for one.

    What has ended and waits for its parent to ask (psutil counts it as alive) is gone too.
    """
    _, alive = psutil.wait_procs(processes, timeout=120)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    "ask",
    [
        lambda pid: os.killpg(pid, signal.SIGINT),  # a terminal sends it to everything that it started
        lambda pid: os.killpg(pid, signal.SIGTERM),  # as `timeout` does
        pytest.param(lambda pid: os.kill(pid, signal.SIGTERM), marks=long),
    ],
    ids=["Ctrl-C", "SIGTERM to the group", "SIGTERM"],
)
def test_asked_once_it_finishes_the_step_saves_and_leaves_nothing(tmp_path: Path, ask: Callable[[int], None]) -> None:
    process, folder = start(tmp_path)
    others = family(process)
    ask(process.pid)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert len(others) >= 4 and gone(others)
    steps = [line["step"] for line in Run.open(folder).metrics()]
    assert steps == list(range(len(steps))) and len(steps) < 40
    assert Run.open(folder).checkpoints.steps() == [len(steps)]
    assert f"stopped after step {len(steps)}, saved in {folder}; name=mine resume=auto" in output


@long
@pytest.mark.parametrize("kind", [[], VERDICT], ids=["backpropagated", "without gradient"])
def test_a_killed_driver_leaves_nothing_and_goes_on_as_if_it_had_not_been(
    local_ray: Any, tmp_path: Path, kind: list[str]
) -> None:
    settings = ["steps=8", "checkpoint.every=2", "name=mine", "resume=auto", *kind]
    process, _ = start(tmp_path, *settings)
    others = family(process)
    process.kill()
    process.communicate(timeout=60)
    assert len(others) >= 4 and gone(others)
    config = loading.load("shapes_flowbp_sparse", [*small_overrides(tmp_path), *settings])
    run, summary = driver.train(config)
    assert [line["step"] for line in run.metrics()] == list(range(8))
    assert summary["weights_sha256"] == local_digest(config)


@long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_twice_it_stops_at_once(tmp_path: Path, number: signal.Signals) -> None:
    process, folder = start(tmp_path, "data.prompts_per_step=96")  # steps of many seconds
    others = family(process)
    os.killpg(process.pid, number)
    time.sleep(2.0)  # signals that come within one wait of Ray, or within a second, are one
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert gone(others)
    assert "stopped at once" in output and "Traceback" not in output
    assert not Run.open(folder).checkpoints.steps()
    assert folder.is_dir()
