"""Runs on real Ray serve their own judge: an actor starts a real vLLM, whose engine is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from flowbp_ray import driver
from flowbp_ray.driver import Loop
from tests.driver.chaos import before_step
from tests.judges.tiny_vlm import make
from tests.judges.vllm_env import CPU, CPU_ARGS, python_or_skip
from tests.paths import DATA
from tests.small import local_digest, small_config

pytestmark = [pytest.mark.ray, pytest.mark.judge, pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPTS = DATA / "few_prompts.txt"
ANSWERED = '"POST /v1/chat/completions HTTP/1.1" 200'


def serving(model: Path) -> list[psutil.Process]:
    """The leash and the server of this model, and what they started; none of them is a child of the judge's actor."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if str(model) in (process.info["cmdline"] or ()):
            found |= {process, *process.children(recursive=True)}
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def until(condition: Any, seconds: float) -> Any:
    """What `condition` says once it is true, or at the end."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return value


def test_a_run_serves_its_judge_and_loses_no_answer_when_the_engine_dies(local_ray: Any, tmp_path: Path) -> None:
    model = make(tmp_path / "tiny_vlm")
    judge = {
        "name": "yes",
        "model": str(model),
        "template": {"kind": "yes_no"},
        "timeout": 300,
        "server": {"python": str(python_or_skip()), "args": CPU_ARGS, "env": CPU},
    }
    evaluated = [f"evaluation.prompts={PROMPTS}", "evaluation.limit=3", "evaluation.every=1", "evaluation.num_steps=2"]
    config = small_config(tmp_path, "flowbp_sparse", *evaluated, f"judges=[{json.dumps(judge)}]", "name=judged")
    log, killed = tmp_path / "judged" / "judge-yes.log", []

    def kill_the_engine(loop: Loop) -> None:
        def answered() -> bool:
            loop.judges.collect()  # which takes what the server wrote, too
            return log.is_file() and ANSWERED in log.read_text()

        assert until(answered, 600), "the first server must have answered"
        [core] = [p for p in serving(model) if "EngineCore" in p.name() + " ".join(p.cmdline())]
        core.kill()
        killed.append(core.pid)

    with before_step(1, kill_the_engine):
        run, summary = driver.train(config)
    assert killed
    assert until(lambda: not serving(model), 30), serving(model)
    lines = [line for line in run.metrics() if line["kind"] == "judge"]
    assert [(line["step"], line["pictures"], line["missing"]) for line in lines] == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]
    assert all(0 < line["yes"] < 1 for line in lines) and len({line["yes"] for line in lines}) == 3
    assert summary["guidance"]["1"]["after"]["yes"]["mean"] == lines[-1]["yes"]
    assert summary["weights_sha256"] == local_digest(config), "a monitor changes no weight"
    said = log.read_text()
    assert said.count("Application startup complete") == 2 and said.count(ANSWERED) >= 3 * 3
    assert str(log) == str(run.folder / "judge-yes.log") and (run.folder / "curves.png").is_file()


def test_a_judge_s_score_is_trained_on_and_no_bit_of_it_is_lost(local_ray: Any, tmp_path: Path) -> None:
    """Five steps learned from P(Yes): one digest with one sampler, with two, and with a judge killed in the third."""
    model = make(tmp_path / "tiny_vlm")
    judge = {
        "name": "agrees",
        "model": str(model),
        "template": {"kind": "yes_no"},
        "role": "reward",
        "timeout": 300,
        "concurrency": 1,  # pictures that vLLM computes together round to other bits
        "server": {"python": str(python_or_skip()), "args": CPU_ARGS, "env": CPU},
    }
    term = "rewards.terms=[{name: agrees, kind: judge, gradient: none}]"
    groups = ["data.prompts_per_step=1", "data.images_per_prompt=2", "steps=5", "learners.optimizer.lr=1e-3"]
    found = {}

    def kill_the_judge(loop: Loop) -> None:
        os.kill(ray.get(loop.judges.handles["agrees"].pid.remote()), signal.SIGKILL)

    for name, samplers, action in (("one", 1, None), ("two", 2, None), ("killed", 1, kill_the_judge)):
        shared = ["method=null", term, *groups, f"judges=[{json.dumps(judge)}]", f"samplers.count={samplers}"]
        config = small_config(tmp_path, "flowbp_sparse", *shared, f"name={name}")
        with before_step(2, action) if action else nullcontext():
            run, summary = driver.train(config)
        lines = [line for line in run.metrics() if line["kind"] == "train"]
        assert [line["nft_unscored"] for line in lines] == [0.0] * 5 and all(line["updated"] for line in lines)
        found[name] = (summary["weights_sha256"], [line["reward/agrees"] for line in lines])
    assert found["one"] == found["two"] == found["killed"]
    assert len(set(found["one"][1])) == 5 and all(0 < mean < 1 for mean in found["one"][1])
    assert "asking again" in (tmp_path / "killed" / "log.txt").read_text()
    assert until(lambda: not serving(model), 30), serving(model)
