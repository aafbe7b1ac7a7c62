"""One DeepSpeed rank that reads states of other engines, writes them again, makes a step and writes that.

Run as `python -m tests.learning.elsewhere FOLDER RANK RANKS PORT`. Processes of their own, because DeepSpeed keeps its
process group and its accelerator for as long as a process lives.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.learning.deepspeed import DeepSpeedEngine, join_process_group
from flowbp_ray.learning.engine import Engine
from flowbp_ray.utils.console import quieten

ROWS = 4
CASES = [(0, False, "float32"), (1, False, "bfloat16"), (2, False, "float32"), (3, False, "float32"),
         (1, True, "float32"), (2, False, "bfloat16"), (3, True, "bfloat16")]  # fmt: skip
"""ZeRO stage, whether AdamW's state is offloaded, the module's dtype."""


def name_of(case: tuple[int, bool, str]) -> str:
    return f"zero{case[0]}{'-offload' * case[1]}-{case[2]}"


def network(dtype: torch.dtype) -> nn.Module:
    """A frozen layer, and trained ones whose sizes no number of ranks divides; one that ZeRO-3 partitions."""
    torch.manual_seed(0)
    frozen = nn.Linear(13, 7).requires_grad_(False)
    return nn.Sequential(frozen, nn.Linear(7, 401), nn.GELU(), nn.Linear(401, 300), nn.GELU(), nn.Linear(300, 3)).to(
        dtype
    )


def config(**settings: object) -> LearnersConfig:
    return LearnersConfig.model_validate({"micro_batch": 1, "ema": {"decay": 0.5}, "lora": {"rank": 1}, **settings})


def stepped(engine: Engine, seed: int, rank: int = 0, ranks: int = 1) -> None:
    """One step on this rank's part of four rows."""
    x = torch.randn(ROWS, 13, generator=torch.Generator().manual_seed(seed)).chunk(ranks)[rank]
    loss = engine.module(x.to(next(engine.module.parameters()).dtype)).float().square().sum()
    engine.backward(loss * engine.scale, True)
    engine.step(1e-3)


def main(folder: Path, rank: int, ranks: int, port: int) -> None:
    for number, case in enumerate(CASES):
        zero, offload, name = case
        dtype = getattr(torch, name)
        chosen = config(engine="deepspeed", count=ranks, zero=zero, offload=offload)
        if not torch.distributed.is_initialized():
            join_process_group(rank, chosen, "127.0.0.1", port, 120)
        engine = DeepSpeedEngine(network(dtype), chosen, dtype)
        engine.load(folder / name)
        engine.save(folder / f"{ranks}-{name_of(case)}-read")
        stepped(engine, 5, rank, ranks)
        engine.save(folder / f"{ranks}-{name_of(case)}-on")
        if ranks == 1:  # what two ranks wrote, at the next stage; over a state that has moved since
            other = CASES[(number + 1) % len(CASES)]
            engine.load(folder / f"2-{name_of(other)}-on")
            engine.save(folder / f"{name_of(other)}-back")


if __name__ == "__main__":
    quieten()
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
