"""Checkpoints of a DeepSpeed rank that trains a small layer beside a large frozen one, at stages 0 to 3.

Run as `python -m tests.learning.adapter_checkpoints FOLDER`; it prints one JSON object. A process of its own, because
DeepSpeed keeps its process group and its accelerator for as long as a process lives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.learning.deepspeed import DeepSpeedEngine, join_process_group
from flowbp_ray.utils.addresses import free_port
from flowbp_ray.utils.console import quieten
from flowbp_ray.weights.fingerprint import fingerprint


def network() -> nn.Module:
    """1.0 M frozen parameters and 5,140 trained ones."""
    torch.manual_seed(0)
    frozen, trained = nn.Linear(1000, 1000).requires_grad_(False), nn.Linear(1000, 5)
    return nn.Sequential(frozen, trained, nn.GELU(), nn.Linear(5, 20))


def stepped(engine: DeepSpeedEngine, seed: int) -> DeepSpeedEngine:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(seed))
    engine.backward(engine.module(x).square().sum(), True)
    engine.step(1e-2)
    return engine


def held(engine: DeepSpeedEngine) -> list[str]:
    """The masters and the average after one more step."""
    stepped(engine, 7)
    assert engine.ema is not None
    return [
        fingerprint({str(i): t.detach() for i, t in enumerate(ts)}) for ts in (engine._shards(), engine.ema.average)
    ]


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        settings = {"engine": "deepspeed", "zero": stage, "micro_batch": 1, "ema": {"decay": 0.5}, "lora": {"rank": 1}}
        config = LearnersConfig.model_validate(settings)
        if not torch.distributed.is_initialized():
            join_process_group(0, config, "127.0.0.1", free_port(""), 60)

        def build(config: LearnersConfig = config) -> DeepSpeedEngine:
            return DeepSpeedEngine(network(), config, torch.float32)

        first = stepped(build(), 1)
        first.save(folder / str(stage))
        loaded = build()
        loaded.load(folder / str(stage))
        files = [f for f in (folder / str(stage)).rglob("*") if f.is_file()]
        found[str(stage)] = {
            "bytes": sum(f.stat().st_size for f in files),
            "goes on": [held(first), held(loaded)],
        }
        if stage:
            overlapping = config.model_copy(update={"interconnect": "pcie"})
            found[str(stage)]["goes on"].append(held(stepped(build(overlapping), 1)))
    print(json.dumps(found))


if __name__ == "__main__":
    quieten()
    main(Path(sys.argv[1]))
