"""How an evaluation's items and processes are arranged, without Ray; tests/driver/test_evaluate.py runs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowbp_ray.evaluate import in_time, processes
from tests.small import small_config


def test_items_are_submitted_in_order_and_not_before_their_prompts_are_held() -> None:
    """What is held is `Needs.between(place, place + 1 + ahead)`: an item beyond it would have its prompts go first."""
    items: list[Any] = list(range(7))
    for ahead in (0, 1, 3, 10):
        submitted: list[Any] = []
        for place, (item, coming) in enumerate(in_time(items, ahead)):
            submitted += coming
            assert item == items[place] and submitted == items[: place + 1 + ahead]
        assert submitted == items


def test_a_sampler_of_a_pair_has_a_gpu_without_its_learner(tmp_path: Path) -> None:
    """No two fit on one GPU: as Ray counts, they would, with the parts that they have beside learners."""
    over = ["cluster.colocate=pairs", "rewards.gpus=0.2", "samplers.count=2", "learners.count=2"]
    small = small_config(tmp_path, "flowbp_sparse", *over, "learners.engine=deepspeed", "encoder.ahead=0")
    found = processes(small, 5)
    assert found.samplers.gpus > 0.5 and found.samplers.gpus + found.rewards.gpus <= 1.0
    assert found.steps == 5 and found.encoder.ahead == 6  # two calls for each of three processes
