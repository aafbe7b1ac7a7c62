"""Configurations that compute on the stand-in, and what one step of them leaves, there or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import StepReport, unpack
from flowbp_ray.utils import accelerator
from tests.backbones.families import run_config
from tests.conftest import Saved
from tests.small import small_config

GPUS = ["encoder.gpus=1", "samplers.gpus=1", "rewards.gpus=1", "learners.gpus=1"]

METHODS = {
    "draft_lv": "n: 1",
    "drtune": "k: 2, stop: 0.5",
    "flowbp_bridge": "k: 2",
    "flowbp_lagrange": "order: 2, tau: 0.2, max_j_rev: 3",
    "flowbp_sparse": "k: 2",
    "leapalign": "",
    "refl": "last: 2",
}
"""The seven methods, with arguments for four steps."""

METER = ["drift.meter=true"]
DRIFT_MAX = ["drift.max=10"]
PENALTY = ["learners.base_penalty={weight: 1.0}"]
EMA = ["learners.ema={decay: 0.5}"]
LORA = ["learners.lora={rank: 4}"]
INT8 = [*LORA, "backbone.quantization=int8"]
NF4 = [*LORA, "backbone.quantization=nf4"]
MOMENTS = ["learners.optimizer.moments=int8"]
SHARED = ["cluster.share_base=true", "samplers.gpus=0.5", "learners.gpus=0.5"]
JITTER = ["rewards.jitter={noise: 0.1, shift: 2}"]
BALANCE = [
    "rewards.balance=grad_norm",
    "rewards.terms=[{name: shapes_clip}, {name: other, kind: shapes_clip_heldout, weight: 0.5}]",
]
ATTACHED = ["backbone.detach_negative=false"]
FUSED = ["learners.fuse=2", "learners.micro_batch=2"]
BF16 = ["backbone.dtype=bfloat16"]


def config_of(family: str, saved: Saved, output: Path, method: str, *overrides: str) -> RunConfig:
    """A tiny run of `family` ("shapes": the embedded model) with every role on the stand-in; four sampling steps."""
    output.mkdir(parents=True, exist_ok=True)
    chosen = f"method={{name: {method}, {METHODS[method]}}}"
    if family == "shapes":
        return small_config(output, "flowbp_sparse", "backbone.num_steps=4", chosen, *GPUS, *overrides)
    return run_config(family, saved(family)[0], output, "flowbp_bridge", chosen, *GPUS, *overrides)


def on_cpu(config: RunConfig) -> RunConfig:
    """The same run without GPUs."""
    roles = ("encoder", "samplers", "rewards", "learners")
    return config.model_copy(update={r: getattr(config, r).model_copy(update={"gpus": 0.0}) for r in roles})


@contextmanager
def without_gpu() -> Iterator[None]:
    """What a machine without a GPU sees: CUDA, which is not available here."""
    before, accelerator.KIND = accelerator.KIND, "cuda"
    try:
        assert not accelerator.available(), "this machine has a GPU; the rehearsal compares with its absence"
        yield
    finally:
        accelerator.KIND = before


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as one product after the other on the CPU too: the stand-in has no fused kernel.

    Encoders attend too, and the key of the embeddings' cache names the device, not its kernels. So the cache is another
    one inside, or a prompt that some test encoded outside would come back with the fused kernel's rounding.
    """
    with sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBP_RAY_CACHE", str(Path(os.environ["FLOWBP_RAY_CACHE"]) / "plain_attention"))
        yield


@dataclass
class Step:
    """One optimizer step: what the scorer gave, how the weights changed, the report."""

    targets: list[Tensor]
    cotangents: list[Tensor]
    scores: list[float]
    change: Tensor
    report: StepReport


def one_step(loop: LocalLoop) -> Step:
    """Take step 0 of a loop; all tensors of the result are on the host, fp32."""
    seen: list[tuple[Any, Any, Any]] = []
    score = loop.scorer.score

    def recorded(item: Any, texts: Any, report: Any, target: Any) -> Any:
        scored, cotangent = score(item, texts, report, target)
        seen.append((target, scored, cotangent))
        return scored, cotangent

    loop.scorer.score = recorded  # type: ignore[method-assign]
    before = _flat(loop)
    report = loop.step(0)
    return Step(
        targets=[unpack(target) for target, _, _ in seen],
        cotangents=[unpack(cotangent) for _, _, cotangent in seen],
        scores=[v for _, scored, _ in seen for rows in scored.scores.values() for row in rows for v in row],
        change=_flat(loop) - before,
        report=report,
    )


def _flat(loop: LocalLoop) -> Tensor:
    masters = loop.learner.engine.masters.values()  # type: ignore[attr-defined]
    return torch.cat([master.detach().float().flatten().cpu() for master in masters])


def relative(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return float((value - expected).norm() / (expected.norm() + 1e-30))
