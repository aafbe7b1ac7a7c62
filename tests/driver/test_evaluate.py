"""An evaluation of its own gives the values of the run's, bit for bit; stopped, it goes on; the base is the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowbp_ray.driver import train
from flowbp_ray.evaluate import evaluate
from flowbp_ray.evaluation.results import compare
from flowbp_ray.evaluation.standalone import Request
from tests.small import small_config

pytestmark = pytest.mark.ray


def test_an_evaluation_of_its_own_is_that_of_the_run(local_ray: Any, tmp_path: Path) -> None:
    held_out = ["evaluation.prompts=shapes:dev", "evaluation.limit=7", "evaluation.batch=3", "evaluation.num_steps=4"]
    config = small_config(tmp_path, "flowbp_sparse", *held_out, "learners.optimizer.lr=1e-3")
    run, _ = train(config)
    saved = run.checkpoints.evaluations(2)

    def values(step: int, metric: str) -> np.ndarray:
        return saved[f"values|{step}|1.0|{metric}"]

    request = Request(str(run.folder), overrides=("samplers.count=2",))
    stopped: list[int] = []

    def stop(done: int, total: int) -> None:
        stopped.append(total)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(request, advance=stop)
    seen: list[tuple[int, int]] = []
    work, tuned = evaluate(request, advance=lambda done, total: seen.append((done, total)))
    assert stopped == [3, 3] and seen == [(1, 3), (2, 3), (3, 3)]
    assert work.folder == run.folder / "evaluations" / "shapes_dev_raw_000002"
    for metric in ("shapes_clip", "verifier"):
        assert np.array_equal(tuned.values[1.0][metric][:, 0], values(2, metric))
    part, said = work.folder / "parts" / "000001.npz", list[str]()
    part.write_bytes(part.read_bytes()[:40])  # as a power cut leaves it
    _, again = evaluate(request, notify=said.append)
    assert any(line.endswith("are drawn again: 1") for line in said)
    for metric, drawn in tuned.values[1.0].items():
        assert np.array_equal(again.values[1.0][metric], drawn, equal_nan=True)
    (work.folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not JSON"):
        evaluate(request)
    _, base = evaluate(Request(str(run.folder), weights="base"))
    assert np.array_equal(base.values[1.0]["shapes_clip"][:, 0], values(0, "shapes_clip"))
    found = compare(tuned, base)[1.0]["shapes_clip"].estimate
    assert found.mean == pytest.approx((values(2, "shapes_clip") - values(0, "shapes_clip")).mean())
    assert work.sheet(1.0).is_file()
