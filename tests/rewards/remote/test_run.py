"""A run on Ray whose rewards are computed by `flowbp-ray serve-reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowbp_ray import driver
from tests.rewards.remote.servers import Server, asking
from tests.small import local_digest, small_config


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_run_with_a_remote_pool_has_the_digest_of_the_local_one(
    local_ray: Any, server: Server, tmp_path: Path
) -> None:
    """Two actors at one server, training and evaluations: the weights of one process without a server."""
    held_out = ["evaluation.prompts=shapes:dev", "evaluation.limit=4", "evaluation.batch=4", "evaluation.pictures=2"]
    config = asking(tmp_path, server.url, "rewards.count=2", *held_out)
    run, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(small_config(tmp_path, "flowbp_sparse"))
    assert summary["guidance"]["1"]["after"]["shapes_clip_heldout"]["mean"] is not None
    assert run.config.rewards.url == [server.url] and "token" not in (run.folder / "log.txt").read_text()
