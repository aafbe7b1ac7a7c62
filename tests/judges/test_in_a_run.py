"""Judges in runs on real Ray; they ask a small HTTP server of the test. A real vLLM: test_vllm.py."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from flowbp_ray import driver
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import Loop
from flowbp_ray.evaluate import evaluate
from flowbp_ray.evaluation.standalone import Request
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.signals import Interrupted
from tests.driver.chaos import before_step
from tests.judges.fake import Fake, picture_of, said
from tests.paths import DATA
from tests.small import local_digest, small_config

pytestmark = [pytest.mark.ray, pytest.mark.long]
PROMPTS = DATA / "few_prompts.txt"


def judged(fake: Fake, role: str, **more: Any) -> str:
    """`judges=[...]` as people write it on the command line."""
    fields = {"name": "eye", "url": fake.url, "role": role, "tries": 2, "backoff": 0.01, **more}
    inside = ", ".join(f"{key}: {value}" for key, value in fields.items())
    return f"judges=[{{{inside}, template: {{kind: unified_reward_1_5}}}}]"


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return small_config(tmp_path, "flowbp_sparse", *overrides)


def evaluated(limit: int = 3) -> list[str]:
    return [
        f"evaluation.prompts={PROMPTS}",
        f"evaluation.limit={limit}",
        "evaluation.every=1",
        "evaluation.num_steps=2",
    ]


def score(body: dict[str, Any]) -> float:
    """A score that can be computed without a judge: 1 + 4 · mean / 255, of the pixels that arrived."""
    return float(1 + 4 * picture_of(body).mean() / 255)


def brightness(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, said(f"Final Score: {score(body):.6f}")


def until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


def lines(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.metrics() if line["kind"] == "judge"]


def test_a_monitor_judges_the_pictures_of_evaluations_and_changes_no_weight(local_ray: Any, tmp_path: Path) -> None:
    """One prompt gets garbage: a missing sample of its own, and no fault of the run, though nonfinite=stop."""

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        text = body["messages"][0]["content"][1]["text"]
        return (200, said("?")) if "only one green circle" in text else brightness(body)

    with Fake(answer) as fake:
        run, summary = driver.train(config(tmp_path, *evaluated(), judged(fake, "monitor", limit=2)))
        asked = len(fake.bodies)
        work, results = evaluate(Request(str(run.folder), judges=True, overrides=("evaluation.batch=2",)))
        with pytest.raises(ValueError, match=r"holds another evaluation[\s\S]*judges was"):
            evaluate(Request(str(run.folder), overrides=("evaluation.batch=2",)))
    again = results.values[1.0]["eye"][:, 0]
    assert again[0] == lines(run)[-1]["eye"] and np.isnan(again[1:]).all() and len(again) == 3
    assert results.summary()["guidance"]["1"]["eye"]["count"] == 1 and work.settings["judges"][0]["name"] == "eye"
    del fake.bodies[asked:]
    assert summary["weights_sha256"] == local_digest(config(tmp_path))
    found = lines(run)
    assert [(line["step"], line["pictures"], line["missing"]) for line in found] == [(s, 2, 1) for s in range(3)]
    seen = [score(b) for b in fake.bodies if "red cross" in str(b["messages"][0]["content"][1])]
    assert sorted(line["eye"] for line in found) == pytest.approx(sorted(seen), abs=1e-5)
    assert len(fake.bodies) == 3 * (1 + 2)
    before, after = (summary["guidance"]["1"][when]["eye"] for when in ("before", "after"))
    assert before["count"] == after["count"] == 1 and before["mean"] == found[0]["eye"]
    assert "only one green circle" in (run.folder / "log.txt").read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_is_not_judged_when_a_run_stops_is_judged_when_it_goes_on(local_ray: Any, tmp_path: Path) -> None:
    """The judge is silent until after the interruption: the pictures of steps 0 and 1 lie in the checkpoint."""
    talks = threading.Event()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        talks.wait(600)
        return brightness(body)

    def ask_to_stop(loop: Loop) -> None:
        loop.interrupts.asked = True

    def pictures(bodies: list[dict[str, Any]]) -> list[bytes]:
        return sorted(picture_of(body).tobytes() for body in bodies)

    with Fake(answer) as fake:
        settings = config(tmp_path, *evaluated(2), judged(fake, "monitor"), "resume=auto", "name=again")
        with before_step(0, ask_to_stop), pytest.raises(Interrupted):
            driver.train(settings)
        assert lines(Run.open(tmp_path / "again")) == []
        seen, stopped = pictures(fake.bodies), len(fake.bodies)
        assert len(seen) <= 2 * 2, "those of steps 0 and 1, where the judge was up in time"
        talks.set()
        run, summary = driver.train(settings)
        asked = fake.bodies[stopped:]
    assert len(asked) == 3 * 2 and set(seen) <= set(pictures(asked))
    found = lines(run)
    assert [(line["step"], line["missing"]) for line in found] == [(0, 0), (1, 0), (2, 0)]
    means = [(score(asked[i]) + score(asked[i + 1])) / 2 for i in (0, 2, 4)]  # the judge takes one call at a time
    assert [line["eye"] for line in found] == pytest.approx(means, abs=1e-5)
    assert summary["guidance"]["1"]["after"]["eye"]["mean"] == found[-1]["eye"]
    assert run.checkpoints.unjudged(2) == {}, "the last checkpoint knows the last answers"
    assert "values|2|1.0|eye" in run.checkpoints.evaluations(2)


@pytest.mark.long
def test_the_log_of_a_server_of_our_own_comes_into_the_runs_folder(local_ray: Any, tmp_path: Path) -> None:
    """Once each line, also of the server after the judge's process was killed; on its own node nothing is left."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    server = f"{{env: {{PYTHONPATH: '{Path(__file__).with_name('stand_in')}'}}}}"
    fields = f"name: own, model: '{model}', tries: 6, server: {server}, template: {{kind: unified_reward_1_5}}"
    log = tmp_path / "logged" / "judge-own.log"

    def on_the_node() -> list[str]:
        found = []
        for file in Path(tempfile.gettempdir()).glob("flowbp-ray-judge-*/server.log"):
            with suppress(OSError):
                found += [str(file)] * (str(model) in file.read_text())
        return found

    def serving() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if str(model) in (p.info["cmdline"] or ())]

    def said(loop: Loop, starts: int) -> bool:
        loop.judges.collect()
        return log.is_file() and log.read_text().count("POST /v1/chat") == 3 * starts

    def kill(loop: Loop) -> None:
        assert until(lambda: said(loop, 1), 120), "the first three pictures are judged, and the log says so"
        assert len(on_the_node()) == 1 and serving()
        os.kill(ray.get(loop.judges.handles["own"].pid.remote()), signal.SIGKILL)

    with before_step(0, kill):
        run, _ = driver.train(config(tmp_path, *evaluated(), f"judges=[{{{fields}}}]", "name=logged"))
    assert [(line["step"], line["own"], line["missing"]) for line in lines(run)] == [
        (step, 4.0, 0) for step in range(3)
    ]
    written = log.read_text().splitlines()
    assert written.count(f"serving {model}") == 2 and written.count('"POST /v1/chat/completions HTTP/1.1" 200') == 3 * 3
    assert len(written) == 2 + 3 * 3, written
    assert on_the_node() == [] and until(lambda: not serving(), 30)


@pytest.mark.parametrize(
    ("say", "wanted"),
    [
        pytest.param(lambda body: "Final Score: 5", "all", id="weight 1"),
        pytest.param(lambda body: "Final Score: 1", "none", id="weight 0", marks=pytest.mark.long),
    ],
)
def test_a_gate_at_its_ends(local_ray: Any, tmp_path: Path, say: Callable[[Any], str], wanted: str) -> None:
    """Weight 1 is the run without a gate, bit for bit; weight 0 changes nothing."""
    with Fake(lambda body, before: (200, said(say(body)))) as fake:
        run, summary = driver.train(config(tmp_path, judged(fake, "gate")))
    train = [line for line in run.metrics() if line["kind"] == "train"]
    assert len(fake.bodies) == 2 * 4, "every picture of every step is looked at"
    if wanted == "all":
        assert summary["weights_sha256"] == local_digest(config(tmp_path))
        assert [(line["gate/eye"], line["kept"]) for line in train] == [(1.0, 1.0)] * 2
    else:
        assert summary["weights_sha256"] == local_digest(config(tmp_path).model_copy(update={"steps": 0}))
        assert [(line["gate/eye"], line["kept"], line["updated"]) for line in train] == [(0.0, 0.0, 0.0)] * 2


@pytest.mark.long
def test_a_gate_that_cannot_see_stops_the_run(local_ray: Any, tmp_path: Path) -> None:
    with (
        Fake(lambda body, before: (200, said("Final Score: 3") if before < 4 else said("a nice picture"))) as fake,
        pytest.raises(RunFailed, match=r"gate 'eye' has no answer \(4 of 4 samples\): unparsable.*2 tries"),
    ):
        driver.train(config(tmp_path, judged(fake, "gate")))
    assert len(fake.bodies) == 4 + 4 * 2
