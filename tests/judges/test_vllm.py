"""A real vLLM on the CPU serves a tiny random Qwen2.5-VL; one start is shared by all tests of this file."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.judge import Judge
from flowbp_ray.judges.preflight import check
from tests.judges.tiny_vlm import make, probability
from tests.judges.vllm_env import CPU, CPU_ARGS, python_or_skip

pytestmark = [pytest.mark.judge, pytest.mark.slow, pytest.mark.timeout(1800)]
CONCURRENCY = 4


def pictures(count: int) -> list[np.ndarray]:
    """Coarse random blocks, so that they differ in what a patch shows; 56 x 56 is not resized."""
    blocks = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [np.kron(block, np.ones((14, 14, 1), np.uint8)) for block in blocks]


def prompts(count: int) -> list[str]:
    return [f"a square, number {i}" for i in range(count)]


def seeds(count: int) -> list[tuple[int, int]]:
    return [(5, i) for i in range(count)]


@pytest.fixture(scope="module")
def python() -> Path:
    return python_or_skip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny_vlm"))


@pytest.fixture(scope="module")
def judge(python: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    config = JudgeConfig.model_validate(
        {
            "name": "tiny",
            "model": str(folder),
            "template": {"kind": "yes_no"},
            "concurrency": CONCURRENCY,
            "timeout": 300,
            "server": {"python": str(python), "args": CPU_ARGS, "env": CPU, "starts": 1},
        }
    )
    check([config])
    judge = Judge(config, tmp_path_factory.mktemp("run") / "judge-tiny.log")
    judge.start()
    yield judge
    judge.close()


def family(judge: Judge) -> list[psutil.Process]:
    """The leash, the server and all that they started."""
    assert judge.server is not None and judge.server.process is not None
    leash = judge.server.process.pid("pid")
    assert leash is not None
    process = psutil.Process(leash)
    return [process, *process.children(recursive=True)]


def engine(judge: Judge) -> psutil.Process:
    [found] = [p for p in family(judge) if "EngineCore" in p.name() + " ".join(p.cmdline())]
    return found


def alive(processes: list[psutil.Process]) -> list[str]:
    """Who is still there; a moment is given to who has ended but was not waited for yet."""
    _, left = psutil.wait_procs(processes, timeout=10)
    return [p.name() for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_p_yes_is_that_of_transformers(judge: Judge, folder: Path) -> None:
    answers = judge.score(pictures(4), prompts(4), seeds(4))
    assert not answers.missing
    want = [
        probability(folder, image, judge.config.template.text(prompt))
        for image, prompt in zip(pictures(4), prompts(4), strict=True)
    ]
    assert np.ptp(want) > 0.01, "the pictures must matter, or this shows nothing"
    assert answers.scores["yes"] == pytest.approx(want, abs=1e-4)


def test_a_picture_that_is_none_is_missing_and_costs_the_others_nothing(judge: Judge) -> None:
    """vLLM refuses with a 400 what is no picture it can take: 1 x 1000 is too narrow for this model."""
    odd = [*pictures(2), np.zeros((1, 1000, 3), np.uint8)]
    answers = judge.score(odd, prompts(3), seeds(3))
    assert [row for row, _ in answers.missing] == [2] and "400" in answers.missing[0][1]
    assert math.isnan(answers.scores["yes"][2]) and all(0 < s < 1 for s in answers.scores["yes"][:2])


def test_a_killed_engine_costs_no_sample_and_leaves_no_process(judge: Judge) -> None:
    """SIGKILL in the middle of a batch: the server starts again, and every score is what it was."""
    assert judge.server is not None
    count = 24
    before = judge.score(pictures(count), prompts(count), seeds(count))
    old, core = family(judge), engine(judge)
    requests = [0]
    one = judge.client._try

    async def counted(*arguments: object) -> dict[str, float]:
        requests[0] += 1
        if requests[0] == count // 2:
            core.send_signal(signal.SIGKILL)
        return await one(*arguments)  # type: ignore[arg-type]

    judge.client._try = counted  # type: ignore[method-assign, assignment]
    try:
        after = judge.score(pictures(count), prompts(count), seeds(count))
    finally:
        judge.client._try = one  # type: ignore[method-assign]
    assert judge.server.deaths == 1 and after.retries > 0
    assert not after.missing
    assert after.scores["yes"] == pytest.approx(before.scores["yes"], abs=1e-5)
    assert not (left := alive(old)), left
    assert engine(judge).pid != core.pid


def test_nothing_is_left_at_the_end(judge: Judge) -> None:
    """The last one of this file: it ends the shared server, engine and all. (Killed askers: test_server.py.)"""
    everybody = family(judge)
    assert len(everybody) >= 3 and engine(judge) in everybody
    assert judge.server is not None
    judge.server.stop()
    assert not (left := alive(everybody)), left
    assert "POST /v1/chat/completions" in judge.server.log.read_text()
