"""Steps of DeepSpeed's engine, in a process of its own for each rank: on the stand-in, or on the CPU.

    python -m tests.gpu.zero <folder> gpu|cpu <rank> <ranks> <port>

`<folder>/flux1` is the model. What a case leaves goes to `<folder>/<gpu|cpu>_<ranks>/<case>_<rank>.pt`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.learning import deepspeed as engine
from flowbp_ray.learning.optim import Ema
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Version
from flowbp_ray.utils import accelerator
from flowbp_ray.utils.checksums import TensorChecksum
from flowbp_ray.weights.buckets import allocate_contiguous, assign_buckets
from flowbp_ray.weights.packing import PackedTensors, merge_tensors
from tests.gpu import standin
from tests.gpu.meters import Waits
from tests.gpu.runs import BF16, EMA, LORA, METER, NF4, PENALTY, config_of, on_cpu, plain_attention

FAMILY = "flux1"

CASES: dict[int, dict[str, tuple[list[str], list[str]]]] = {
    1: {
        "zero0": (["learners.zero=0"], EMA),
        "zero1": (["learners.zero=1"], [*METER, *PENALTY, *EMA]),
        "zero2-bf16": (["learners.zero=2"], [*BF16, *EMA]),
        "zero1-lora-bf16": (["learners.zero=1"], [*BF16, *LORA]),
        "zero2-nf4": (["learners.zero=2"], [*NF4, *METER]),
        "zero1-offload-bf16": (["learners.zero=1", "learners.offload=true"], BF16),
        "zero3-bf16": (["learners.zero=3"], [*BF16, *EMA]),
    },
    2: {
        "zero1-pcie": (["learners.zero=1", "learners.interconnect=pcie"], [*METER, *PENALTY, *EMA]),
        "zero2-lora-bf16": (["learners.zero=2"], [*BF16, *LORA, *EMA]),
    },
}
"""By ranks: the engine of a case, and the other overrides, which any engine takes."""


class HostEma(Ema):
    """An average that stays on the host."""

    def __init__(self, shards: Sequence[Tensor], *rest: Any) -> None:
        super().__init__(shards, *rest)
        self.average = [average.cpu() for average in self.average]


FAULTS = {
    "the average stays on the host": (engine, "Ema", HostEma),
    "masters are gathered on the host": (
        engine,
        "allocate_contiguous",
        lambda wanted, device: allocate_contiguous(wanted, "cpu"),
    ),
}
"""What is put in on purpose with the case `zero1`."""


@dataclass
class Left:
    """What a case leaves: of its first step, of what was published after it, of going on from what was saved."""

    change: Tensor
    grad_norm: float
    waits: int
    """In the learner's step."""
    places: str
    """Where."""
    trained: int
    """Tensors."""
    published: dict[bool, dict[str, Tensor]] = field(default_factory=dict)
    """This rank's part of the weights, and of their average (True)."""
    checksums: dict[bool, dict[str, TensorChecksum]] = field(default_factory=dict)
    arrived: str = ""
    """The sampler's digest after it."""
    devices: set[str] = field(default_factory=set)
    digests: list[str] = field(default_factory=list)
    """After the second step; after the first one was restored and the second one done again."""


def config(folder: Path, output: Path, name: str, ranks: int, plain: bool = False) -> RunConfig:
    """The run of a case on the stand-in. plain: on one rank, with the engine `torch`."""
    own, overrides = CASES[ranks][name]
    chosen = ["learners.engine=torch"] if plain else [*own, "learners.engine=deepspeed", f"learners.count={ranks}"]
    more = [*chosen, "data.rollout_batch=1", "steps=2", *overrides]
    return config_of(FAMILY, lambda family: (folder / family, None), output, "flowbp_bridge", *more)


def steps(run: RunConfig, folder: Path, rank: int = 0) -> Left:
    """Two steps with a save between them, and the second one again after a restoration."""
    loop, ranks = LocalLoop(run), run.learners.count
    learner = loop.learner
    learner.rank = rank

    def whole() -> list[PackedTensors]:
        """All trained weights, on every rank."""
        return [PackedTensors.of(part) for part in learner.engine.parts(assign_buckets(learner.engine.sizes()))]

    def flat() -> Tensor:
        return torch.cat([tensor.float().flatten() for tensor in merge_tensors(whole()).values()])

    def own(step: int) -> tuple[list[Any], list[Any], tuple[float, ...]]:
        """This rank's rollouts and cotangents; every rank rolls the whole batch out."""
        published, found = whole(), []
        for item in loop.source.of_step(step, Version(0, step)):
            report, rollout, target = loop.sampler.rollout(item, lambda: published)
            texts = [loop.texts[i] for i in item.prompt_ids]
            found.append((rollout, loop.scorer.score(item, texts, report, target)[1]))
        mine = found[rank::ranks]
        return [rollout for rollout, _ in mine], [cotangent for _, cotangent in mine], (1.0,) * len(mine)

    before, batch = flat(), own(0)
    with Waits() as waits:
        report = learner.step(0, *batch)
    assert not report.faults
    left = Left(flat() - before, report.grad_norm, waits.total, f"{waits.kinds}\n{waits}", len(learner.engine.sizes()))
    for ema in (False, True) if run.learners.ema else (False,):
        published = [{name: t.clone() for name, t in part.tensors().items()} for part in learner.publish(ema)]
        left.published[ema] = {name: tensor for part in published for name, tensor in part.items()}
        left.checksums[ema] = learner.checksums(ema)
    left.devices = {p.device.type for p in learner.engine.module.parameters()}
    learner.save(str(folder))
    batch = own(1)
    left.arrived = loop.sampler.digest()
    learner.step(1, *batch)
    left.digests.append(learner.digest())
    learner.load(str(folder))
    learner.step(1, *batch)
    left.digests.append(learner.digest())
    return left


def faulty(run: RunConfig, folder: Path, what: str) -> str:
    """The steps with a fault: the error that they end with, or "" if they do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FAULTS[what])
        try:
            steps(run, folder)
        except RuntimeError as error:
            return str(error)
    return ""


def main(folder: Path, where: str, rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    if where == "gpu":
        from tests.gpu.standin import zero

        zero.install()
        accelerator.choose([str(rank)], {})
    else:
        standin.extension()  # for Waits
    own = folder / f"run_{where}_{ranks}_{rank}"
    runs = {name: config(folder, own, name, ranks) for name in CASES[ranks]}
    if where == "cpu":
        runs = {name: on_cpu(run) for name, run in runs.items()}
    engine.join_process_group(rank, next(iter(runs.values())).learners, "127.0.0.1", port, 300.0)
    out = folder / f"{where}_{ranks}"
    out.mkdir(exist_ok=True)
    with plain_attention() if where == "cpu" else nullcontext():
        for name, run in runs.items():
            torch.save(steps(run, out / name, rank), out / f"{name}_{rank}.pt")
        if ranks == 1:
            torch.save({what: faulty(runs["zero1"], out / "faulty", what) for what in FAULTS}, out / "faults.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from tests.gpu import zero as this  # by the name by which the tests read what it leaves

    this.main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
