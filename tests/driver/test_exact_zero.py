"""ZeRO over real ranks against one process with plain torch, over the space of settings that must not matter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from actors.fleet import Fleet
from actors.transport import load
from flowbp_ray import driver
from flowbp_ray.control.selection import select
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Version
from flowbp_ray.preflight import check
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.packing import merge_tensors
from tests.small import small_config

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]


@dataclass(frozen=True)
class Case:
    """One point of the space; every two values of different settings meet in some case of CASES."""

    zero: int
    ranks: int
    lora: bool
    checkpointing: bool
    fuse: int
    method: str
    draws: str
    offload: bool = False

    @property
    def shared(self) -> list[str]:
        """What the process without Ray is given too.

        The rate of adapters by Lagrange: at 1e-3 one process differs from itself with another micro_batch by 1e-5.
        """
        rate = "5e-5" if self.method == LAGRANGE else "1e-3"
        lora = ["learners.lora={rank: 4, alpha: 8}", f"learners.optimizer.lr={rate}"] if self.lora else []
        count = ["method.k=3"] if self.method == BRIDGE else []
        return ["steps=5", f"method.draws={self.draws}", f"seed={40 + self.zero}", *count, *lora]

    @property
    def own(self) -> list[str]:
        return [
            "learners.engine=deepspeed",
            f"learners.count={self.ranks}",
            f"learners.zero={self.zero}",
            f"learners.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"learners.fuse={self.fuse}",
            f"learners.offload={str(self.offload).lower()}",
        ]

    def __str__(self) -> str:
        kind = "lora" if self.lora else "full"
        again = "checkpointing" if self.checkpointing else "plain"
        where = "-offload" if self.offload else ""
        return f"zero{self.zero}-{self.ranks}ranks-{kind}-{again}-fuse{self.fuse}-{self.method}-{self.draws}{where}"


ALL = 64  # fuse: more than there are nodes
BRIDGE, LAGRANGE = "flowbp_bridge", "flowbp_lagrange"
CASES = [
    Case(0, 1, False, False, 1, BRIDGE, "per_batch"),
    Case(0, 2, True, True, ALL, LAGRANGE, "per_sample"),
    Case(1, 1, True, True, 1, LAGRANGE, "per_batch"),
    Case(1, 2, False, False, ALL, BRIDGE, "per_sample"),
    Case(2, 1, False, True, ALL, LAGRANGE, "per_sample"),
    Case(2, 2, True, False, 1, BRIDGE, "per_sample"),
    Case(3, 1, True, False, ALL, BRIDGE, "per_batch"),
    Case(3, 2, False, True, 1, LAGRANGE, "per_sample"),
    Case(3, 2, True, False, 1, BRIDGE, "per_sample"),
    Case(0, 2, False, True, 1, BRIDGE, "per_sample"),
    Case(2, 2, False, False, ALL, LAGRANGE, "per_batch"),
    Case(1, 2, False, False, 1, BRIDGE, "per_batch", offload=True),
    Case(2, 2, True, False, ALL, LAGRANGE, "per_sample", offload=True),
    Case(3, 2, False, True, ALL, BRIDGE, "per_sample", offload=True),
]
SHORT = [CASES[7]]


def whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("case", [c if c in SHORT else pytest.param(c, marks=pytest.mark.long) for c in CASES], ids=str)
def test_zero_equals_one_process(local_ray: Any, tmp_path: Path, case: Case) -> None:
    """Five steps: within 1e-6 of plain torch relative to the weights, and moved by far more than that."""
    run, _ = driver.train(small_config(tmp_path, case.method, *case.shared, *case.own))
    loop = LocalLoop(small_config(tmp_path, case.method, *case.shared))
    start = whole({k: v.clone() for k, v in loop.learner.engine.weights().items()})
    for step in range(5):
        loop.step(step)
    got, want = whole(run.checkpoints.weights()[1]), whole(loop.learner.engine.weights())
    assert float((got - want).norm()) <= 1e-6 * float(want.norm())
    assert float((start - want).norm()) > 5e-4 * float(want.norm())


@pytest.mark.long
@pytest.mark.parametrize("zero", [2, 3])
def test_the_base_penalty_over_two_ranks(local_ray: Any, tmp_path: Path, zero: int) -> None:
    """Three steps: the weights and the logged distances are those of one process, and the penalty shows in the weights.

    A large weight multiplies the rounding of v_theta − v_base: at 100 one process differs from itself by 5e-6 with
    another micro_batch.
    """
    lora = ["learners.lora={rank: 4, alpha: 8}", "learners.optimizer.lr=1e-3"] if zero == 3 else []
    shared = ["steps=3", "method.k=3", "method.draws=per_sample", "learners.base_penalty.weight=1", *lora]
    own = ["learners.engine=deepspeed", "learners.count=2", f"learners.zero={zero}"]
    run, _ = driver.train(small_config(tmp_path, BRIDGE, *shared, *own))
    loop = LocalLoop(small_config(tmp_path, BRIDGE, *shared))
    distances = [(sum(loop.step(step).base_distance) / 4) ** 0.5 for step in range(3)]
    got, want = whole(run.checkpoints.weights()[1]), whole(loop.learner.engine.weights())
    assert float((got - want).norm()) <= 1e-6 * float(want.norm())
    logged = [line["base_distance"] for line in run.metrics() if line["kind"] == "train"]
    assert logged == pytest.approx(distances, rel=1e-3, abs=1e-6) and logged[2] > 1e-4
    assert run.metrics()[-1]["base_penalty"] == pytest.approx(logged[2] ** 2)
    plain = LocalLoop(small_config(tmp_path, BRIDGE, *shared, "learners.base_penalty.weight=0"))
    for step in range(3):
        plain.step(step)
    assert float((whole(plain.learner.engine.weights()) - want).norm()) > 2e-5 * float(want.norm())


@pytest.mark.long
def test_two_seeds_differ(local_ray: Any, tmp_path: Path) -> None:
    digests = {driver.train(small_config(tmp_path, BRIDGE, f"seed={s}"))[1]["weights_sha256"] for s in (1, 2)}
    assert len(digests) == 2


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_sharded_average_is_the_average_of_what_was_published(local_ray: Any, tmp_path: Path, zero: int) -> None:
    """ema[n] = d·ema[n−1] + (1−d)·w[n], from the published weights; and the masters' fingerprint is the published."""
    config = small_config(
        tmp_path,
        BRIDGE,
        "learners.engine=deepspeed",
        "learners.count=2",
        f"learners.zero={zero}",
        "learners.ema.decay=0.7",
        "learners.optimizer.lr=1e-3",
    )
    records = check(config).training
    loop = LocalLoop(config.model_copy(update={"learners": config.learners.model_copy(update={"engine": "torch"})}))
    with Fleet(config, [r.text for r in records]) as fleet:

        def fetch(version: Version) -> dict[str, Tensor]:
            published = fleet.learners.publish(version)
            tensors = {k: v.clone() for k, v in merge_tensors(load(published.weights)).items()}
            assert published.fingerprint == fingerprint(tensors)
            return tensors

        want = {k: v.double() for k, v in fetch(Version(0, 0)).items()}
        for step in range(2):
            fleet.pipeline.submit(loop.items(step), fleet.learners.publish(Version(0, step)))
            items = fleet.pipeline.collect(step)
            fleet.learners.step(step, items, select(items, (), config.rewards))
            raw = fetch(Version(0, step + 1))
            want = {k: 0.7 * v + 0.3 * raw[k].double() for k, v in want.items()}
        average = fetch(Version(0, 2, ema=True))
        assert fingerprint(fetch(Version(0, 2))) == fingerprint(raw)  # asking for the average changed nothing
    assert float((whole(average) - whole(want)).norm()) <= 1e-7 * float(whole(want).norm())
    assert float((whole(average) - whole(raw)).norm()) > 1e-4 * float(whole(want).norm())
    assert ray.is_initialized()
