"""CPU threads of learners: as written, one, or a part of the node where AdamW runs on the host of a GPU."""

from __future__ import annotations

from typing import Any

from actors.learner import even_part, learner_threads
from flowbp_ray.config.learners import LearnersConfig


def learners(**changes: Any) -> LearnersConfig:
    return LearnersConfig.model_validate({"micro_batch": 1, **changes})


def test_threads_are_those_written_and_one_where_a_gpu_or_a_cpu_does_all() -> None:
    assert (
        learner_threads(learners()) == learner_threads(learners(gpus=1)) == learner_threads(learners(offload=True)) == 1
    )
    assert learner_threads(learners(threads=3, gpus=1, offload=True)) == 3


def test_ranks_of_a_node_share_its_cores() -> None:
    """Eight GPUs hold eight ranks of sixteen, or the only two; parts of a GPU hold one learner at most."""
    assert even_part(128, 8, learners(gpus=1, count=16)) == 16
    assert even_part(128, 8, learners(gpus=1, count=2)) == 64
    assert even_part(24, 1, learners(gpus=0.5)) == 24 and even_part(2, 8, learners(gpus=1, count=8)) == 1
