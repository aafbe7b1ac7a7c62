"""A judge's score that is trained on, on real Ray: the weights are those of a reward that gives the same numbers."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from flowbp_ray import driver
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import Loop
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from tests.driver.chaos import before_step
from tests.judges import bright
from tests.judges.fake import Fake, picture_of, said
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray
OWN = "{name: eye, kind: 'tests.judges.bright:Bright', gradient: none}"
JUDGED = "{name: eye, kind: judge, gradient: none}"


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    """Two prompts of three images, five steps; each item has one image of one or two prompts."""
    groups = ["data.prompts_per_step=2", "data.images_per_prompt=3", "learners.optimizer.lr=1e-3", "steps=5"]
    return small_config(tmp_path, "flowbp_sparse", *groups, "method=null", *overrides)


def judged(fake: Fake, term: str = JUDGED) -> list[str]:
    fields = f"name: eye, url: '{fake.url}', role: reward, tries: 2, backoff: 0.01"
    return [f"judges=[{{{fields}, template: {{kind: unified_reward_1_5}}}}]", f"rewards.terms=[{term}]"]


def trained(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.metrics() if line["kind"] == "train"]


@pytest.mark.parametrize("samplers", [2, pytest.param(1, marks=pytest.mark.long)])
def test_a_judge_is_a_reward_and_may_be_killed_in_the_middle(local_ray: Any, tmp_path: Path, samplers: int) -> None:
    """Five steps; in the third the judge's process dies while it is asked. The digest is that of one process."""
    killed: list[int] = []
    asked = threading.Event()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        if before >= 2 * 6:
            asked.set()
            time.sleep(0.0 if killed else 1.0)
        return bright.answer(body)

    def strike(loop: Loop) -> None:
        pid = ray.get(loop.judges.handles["eye"].pid.remote())

        def kill() -> None:
            asked.wait(120)
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()

    with Fake(answer) as fake, before_step(2, strike):
        run, summary = driver.train(config(tmp_path, *judged(fake), f"samplers.count={samplers}"))
    assert killed and len(fake.bodies) > 5 * 6 and "asking again" in (run.folder / "log.txt").read_text()
    assert summary["weights_sha256"] == local_digest(config(tmp_path, f"rewards.terms=[{OWN}]"))
    assert [line["nft_unscored"] for line in trained(run)] == [0.0] * 5


@pytest.mark.long
def test_beside_other_terms_of_both_kinds(local_ray: Any, tmp_path: Path) -> None:
    def terms(eye: str) -> str:
        return f"{{name: shapes_clip}}, {{name: shapes_verifier, gradient: none, weight: 0.5}}, {eye}"

    mixed = ["method={name: flowbp_sparse, k: 2}", "data.prompts=shapes:train", "staleness=0", "steps=3"]
    with Fake(bright.answer) as fake:
        run, summary = driver.train(config(tmp_path, *judged(fake, terms(JUDGED)), *mixed))
    assert summary["weights_sha256"] == local_digest(config(tmp_path, f"rewards.terms=[{terms(OWN)}]", *mixed))
    assert all("reward_grad_cosine/shapes_verifier,eye" in line for line in trained(run))


def test_a_picture_that_cannot_be_scored_leaves_its_prompt_out(local_ray: Any, tmp_path: Path) -> None:
    """One picture gets garbage, in every try: the other prompt is learned from alone, and the run goes on."""
    bad: list[bytes] = []
    lock = threading.Lock()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        picture = picture_of(body).tobytes()
        with lock:
            bad.extend([picture] * (not bad))
        return (200, said("a nice picture")) if picture == bad[0] else bright.answer(body)

    with Fake(answer) as fake:
        run, _ = driver.train(config(tmp_path, *judged(fake), "steps=2"))
    lines = trained(run)
    assert [line["nft_unscored"] for line in lines] == [0.5, 0.0] and [line["kept"] for line in lines] == [1.0, 1.0]
    assert [line["forwards"] for line in lines] == [3 * 2 / 2, 6 * 2 / 2]
    assert len(fake.bodies) == 2 * 6 + 1 and "no score" in (run.folder / "log.txt").read_text()


@pytest.mark.long
def test_without_any_answer_nothing_is_learned(local_ray: Any, tmp_path: Path) -> None:
    """Never a zero: no weight moves, and after ten such steps the run fails."""
    with Fake(lambda body, before: (200, said("?"))) as fake:
        run, summary = driver.train(config(tmp_path, *judged(fake), "steps=2"))
    assert summary["weights_sha256"] == local_digest(config(tmp_path, f"rewards.terms=[{OWN}]", "steps=1").model_copy(
        update={"steps": 0}
    ))  # fmt: skip
    assert [(line["nft_unscored"], line["updated"]) for line in trained(run)] == [(1.0, 0.0)] * 2
    with Fake(lambda body, before: (200, said("?"))) as fake, pytest.raises(RunFailed, match="10 steps in a row"):
        driver.train(config(tmp_path, *judged(fake), "steps=12"))
