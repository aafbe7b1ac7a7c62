"""A run without guidance that is held to the guided base, on real Ray: the weights are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowbp_ray import driver
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray


def test_the_weights_are_those_of_one_process(local_ray: Any, tmp_path: Path) -> None:
    """With adapters, two samplers and two reward servers; what is logged says how far the guided base is."""
    more = ["learners.lora={rank: 4, alpha: 8}", "learners.optimizer.lr=1e-3", "samplers.count=2", "rewards.count=2"]
    config = small_config(tmp_path, "flowbp_sparse", "learners.base_penalty={weight: 10, guidance: 3}", *more)
    run, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)
    plain = small_config(tmp_path, "flowbp_sparse", "learners.base_penalty={weight: 10}", *more)
    assert summary["weights_sha256"] != local_digest(plain)
    lines = [line for line in run.metrics() if line["kind"] == "train"]
    assert all(line["base_penalty"] == pytest.approx(10 * line["base_distance"] ** 2) for line in lines)
    assert lines[0]["base_distance"] > 0.05 and "distilled guidance 3" in summary["caution"]
    assert "distilling guidance 3 of the base" in (run.folder / "log.txt").read_text()
