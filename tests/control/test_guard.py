"""The guard's verdict on hand-made evaluations, and a real run that it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control import guard
from flowbp_ray.driver import train
from flowbp_ray.evaluation.estimates import Evaluation
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.signals import Interrupted
from tests.driver.chaos import before_step
from tests.small import small_overrides

METRICS = "guard.metrics={shapes_clip_heldout: 0.05, verifier: 0.1}"


def config(tmp_path: Path, *more: str) -> RunConfig:
    own = ["rewards.monitors=[shapes_clip_heldout]", "evaluation.prompts=shapes:heldout", "evaluation.every=1"]
    if not any(change.startswith("guard.metrics") for change in more):
        own.append(METRICS)
    return loading.load("shapes_flowbp_sparse", [*small_overrides(tmp_path), *own, *more])


def guard_of(config: RunConfig) -> guard.Guard:
    found = guard.Guard.of(config.guard, config.rewards, config.evaluation)
    assert found is not None
    return found


def evaluations(trained: list[float], heldout: list[float], verifier: list[float]) -> dict[int, Any]:
    """One evaluation every ten steps with these means."""
    values = zip(trained, heldout, verifier, strict=True)
    names = ("shapes_clip", "shapes_clip_heldout", "verifier")
    return {
        10 * i: {1.0: Evaluation({n: np.full(4, v) for n, v in zip(names, three, strict=True)}, {}, ("a",) * 4)}
        for i, three in enumerate(values)
    }


@pytest.mark.parametrize(
    ("heldout", "verifier", "metric"),
    [
        ([0.5, 0.49, 0.44, 0.43], [0.4, 0.4, 0.4, 0.4], "shapes_clip_heldout"),
        ([0.5, 0.6, 0.6, 0.6], [0.4, 0.5, 0.29, 0.2], "verifier"),
        ([0.5, 0.44, 0.46, 0.44], [0.4, 0.4, 0.4, 0.4], None),  # not twice in a row
        ([0.5, 0.46, 0.46, 0.46], [0.4, 0.31, 0.31, 0.31], None),  # within the margins
        ([0.5, 0.44, float("nan"), 0.44], [0.4, 0.4, 0.4, 0.4], None),  # what is missing proves nothing
    ],
)
def test_what_falls_twice_beyond_its_margin_is_named(
    tmp_path: Path, heldout: list[float], verifier: list[float], metric: str | None
) -> None:
    found = guard_of(config(tmp_path)).verdict(evaluations([0.3, 0.4, 0.5, 0.6], heldout, verifier))
    assert (found and found.metric) == metric
    if found is not None:
        assert found.step == 30 and found.rose == {"shapes_clip": (pytest.approx(0.3), pytest.approx(0.6))}


def test_a_reward_that_did_not_rise_was_not_hacked(tmp_path: Path) -> None:
    fell = [0.5, 0.4, 0.3]
    assert guard_of(config(tmp_path)).verdict(evaluations([0.3, 0.3, 0.2], fell, [0.4] * 3)) is None
    assert guard_of(config(tmp_path)).verdict(evaluations([0.3, 0.4, 0.31], fell, [0.4] * 3)) is not None


def test_patience_and_the_best_step(tmp_path: Path) -> None:
    results = evaluations([0.3, 0.4, 0.5, 0.6], [0.5, 0.55, 0.44, 0.40], [0.4, 0.45, 0.45, 0.45])
    assert guard_of(config(tmp_path, "guard.patience=3")).verdict(results) is None
    found = guard_of(config(tmp_path)).verdict(results)
    assert found is not None and found.best == 10 and guard_of(config(tmp_path)).best(results, results) == 10
    assert "step 30: shapes_clip rose from 0.300 to 0.600 while shapes_clip_heldout fell" in found.describe()


NAN = float("nan")


@pytest.mark.parametrize(
    ("trained", "heldout", "verifier", "metric", "best"),
    [
        ([0.3, 0.4, 0.5, 0.6], [NAN, 0.5, 0.44, 0.43], [0.4, 0.4, 0.4, 0.4], "shapes_clip_heldout", 10),
        ([NAN, 0.4, 0.5, 0.6], [0.5, 0.5, 0.4, 0.3], [0.4, 0.4, 0.4, 0.4], "shapes_clip_heldout", 10),
        ([0.3, 0.4, 0.5, 0.6], [NAN, 0.5, 0.5, 0.5], [0.4, 0.45, 0.2, 0.1], "verifier", 10),
        ([0.3, 0.4, 0.5, 0.6], [NAN] * 4, [0.4, 0.45, 0.2, 0.1], "verifier", 10),
        ([0.3, 0.4, 0.5, 0.6], [NAN] * 4, [NAN] * 4, None, None),
        ([NAN] * 4, [0.5, 0.5, 0.4, 0.3], [0.4, 0.4, 0.4, 0.4], None, None),
    ],
)
def test_what_is_missing_at_first_begins_where_it_is_there(
    tmp_path: Path,
    trained: list[float],
    heldout: list[float],
    verifier: list[float],
    metric: str | None,
    best: int | None,
) -> None:
    """A judge that was down at the first evaluation blinds the guard neither then nor in its choice of the best."""
    found = guard_of(config(tmp_path)).verdict(evaluations(trained, heldout, verifier))
    assert (found and found.metric, found and found.best) == (metric, best)
    if metric == "shapes_clip_heldout" and found is not None:
        assert found.start == 0.5 and found.rose["shapes_clip"][0] == next(x for x in trained if x == x)


def test_a_rollback_goes_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path, "guard.action=rollback"))
    results = evaluations([0.3, 0.4, 0.5, 0.6], [0.5, 0.55, 0.44, 0.40], [0.4, 0.45, 0.45, 0.45])
    found = guard_of(run.config).verdict(results)
    assert found is not None and found.best == 10
    for saved, target in (([30], 30), ([20, 30], 20), ([0, 30], 0), ([10, 30], 10)):
        shutil.rmtree(run.checkpoints.folder)
        for step in saved:
            run.checkpoints.path(step).mkdir(parents=True)
            (run.checkpoints.path(step) / "weights.safetensors").touch()
        assert run.checkpoints.steps() == saved
        assert guard_of(run.config).reachable(found, results, run).best == target
    assert "step 10 has no checkpoint; going back to step 30" in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("guard.metrics={shapes_clip: 0.1}", "which is trained on"),
        ("guard.metrics={pickscore: 0.1}", "which is not measured; write one of shapes_clip_heldout, verifier"),
        ("evaluation.every=0", "write evaluation.prompts and evaluation.every"),
        ("evaluation.guidance=[]", "at the first of evaluation.guidance; write one"),
    ],
)
def test_a_guard_that_could_not_judge_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, change)


class Whiteness:
    """A reward that is easily hacked: how white the picture is."""

    name = "whiteness"

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3)) - torch.tensor(0.0)


HACKED = [
    "rewards.terms=[{name: whiteness, kind: 'tests.control.test_guard:Whiteness', clip: 2.0, scale: 10.0}]",
    "steps=30",
    "learners.optimizer.lr=1.0e-3",
    "evaluation.every=3",
    "evaluation.limit=24",
    "evaluation.batch=12",
    "guard.metrics={verifier: 0.05}",
]


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_hacked_run_ends_by_itself(tmp_path: Path, local_ray: None, action: str) -> None:
    own = [*HACKED, f"guard.action={action}", "checkpoint.keep=1"]
    run, summary = train(config(tmp_path, *own))
    told = summary["guard"]
    assert told["step"] < 30 and told["metric"] == "verifier" and told["now"] < told["start"] - 0.05
    assert (
        json.loads((run.folder / "summary.json").read_text())["guard"]["line"] in (run.folder / "log.txt").read_text()
    )
    lines = [line for line in run.metrics() if line["kind"] == "evaluation"]
    assert lines[-1]["step"] == told["step"] and lines[-1]["whiteness"] > lines[0]["whiteness"]
    assert (run.folder / "curves.png").is_file()
    kept = told["best"] if action == "rollback" else told["step"]
    assert run.checkpoints.steps()[-1] == kept
    at = next(line for line in lines if line["step"] == kept)
    after = summary["guidance"]["1"]["after"]["verifier"]["mean"]
    assert after == pytest.approx(at["verifier"])
    with pytest.raises(ConfigError, match=r"the guard ended .* guard.action=warn goes on"):
        train(config(tmp_path, *own, f"name={run.folder.name}", "resume=auto"))
    assert Run.open(run.folder).checkpoints.steps()[-1] == kept


@pytest.mark.ray
@pytest.mark.long
def test_a_run_that_is_told_to_roll_back_later_ends_where_it_has_a_checkpoint(tmp_path: Path, local_ray: None) -> None:
    """It began with warn, so the evaluation that was best, the first one, has none."""
    more = [*HACKED, "guard.patience=1", "name=late", "checkpoint.every=9", "resume=auto"]
    with before_step(10, lambda loop: setattr(loop.interrupts, "asked", True)), pytest.raises(Interrupted):
        train(config(tmp_path, *more, "guard.action=warn", "guard.metrics={verifier: 0.9}"))
    begun = Run.open(tmp_path / "late").checkpoints.steps()
    assert begun and begun[0] > 0
    run, summary = train(config(tmp_path, *more, "guard.action=rollback", "guard.metrics={verifier: 0.05}"))
    assert summary["guard"]["best"] == run.checkpoints.steps()[-1] and summary["guard"]["best"] >= begun[0]
    assert "has no checkpoint; going back to step" in (run.folder / "log.txt").read_text()
