"""The optimizer, the learning rate schedule, and the exponential moving average (EMA) of the weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.config.learners import EmaConfig, OptimizerConfig, ScheduleConfig
from flowbp_ray.utils import accelerator
from flowbp_ray.utils.errors import need_package


def adamw(parameters: list[nn.Parameter], config: OptimizerConfig, device: str) -> torch.optim.Optimizer:
    """AdamW over `parameters`. device: where the forwards compute; an offloaded state may be elsewhere.

    Moments in int8 are those of bitsandbytes, which has kernels for CUDA and for CPUs; raises ValueError without it. On
    CUDA one fused kernel updates everything in place (over a list of tensors it would hold one more number per
    parameter). On CPUs it is torch's default, whose last bits differ from those of the fused kernel.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    settings["weight_decay"] = config.weight_decay
    if config.moments == "int8":
        check_moments(config)
        optimizer: torch.optim.Optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(
            parameters, **settings, min_8bit_size=SMALLEST_QUANTISED
        )
        return optimizer
    return torch.optim.AdamW(parameters, **settings, fused=True if device == accelerator.KIND else None)


SMALLEST_QUANTISED = 4096
"""Elements from which a tensor's moments are kept in int8; biases and norms are more sensitive and take no memory."""


def check_moments(config: OptimizerConfig) -> None:
    """Raises ValueError where the library is missing that `moments` needs."""
    if config.moments == "int8":
        need_package("learners.optimizer.moments=int8", "bitsandbytes", "quant")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


PIECE = 1 << 24
"""Elements that `Ema` swaps at a time, which bounds the temporary copy."""


class Ema:
    """The exponential moving average of one rank's shards. It starts as a copy of them."""

    def __init__(self, shards: Sequence[Tensor], config: EmaConfig) -> None:
        """shards: the rank's fp32 masters, whole or flat partitions. Pass the same list in the same order each time."""
        self.config, self.decay = config, config.at(0)
        self.average = [shard.detach().clone() for shard in shards]

    def begin(self, step: int) -> None:
        """Use the decay of optimizer step `step` from now on."""
        self.decay = self.config.at(step)

    @torch.no_grad()
    def update(self, shards: Sequence[Tensor]) -> None:
        torch._foreach_lerp_(self.average, [shard.detach() for shard in shards], 1.0 - self.decay)

    @contextmanager
    def swapped(self, shards: Sequence[Tensor]) -> Iterator[None]:
        """Exchange shards and average inside the context, so that code that gathers the weights gathers the average."""
        self._swap(shards)
        try:
            yield
        finally:
            self._swap(shards)

    @torch.no_grad()
    def _swap(self, shards: Sequence[Tensor]) -> None:
        for whole in zip(self.average, shards, strict=True):
            pieces = [tensor.detach().view(-1).split(PIECE) for tensor in whole]
            for average, shard in zip(*pieces, strict=True):
                kept = shard.clone()
                shard.copy_(average)
                average.copy_(kept)

    def state(self) -> list[Tensor]:
        return self.average

    def load(self, state: Sequence[Tensor]) -> None:
        for average, saved in zip(self.average, state, strict=True):
            average.copy_(saved)


def require_ema(ema: Ema | None) -> Ema:
    """Return the average. Raises ValueError if the config keeps none."""
    if ema is None:
        raise ValueError("no average is kept: write learners.ema.decay, such as 0.999")
    return ema


def lr_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of the base learning rate in `step` (from 0) of a run of `steps` optimizer steps.

    Warm-up: (step + 1) / warmup, linear. After it, with t in [0, 1] over the remaining steps: constant 1;
    linear 1 − (1 − end)·t; cosine end + (1 − end)·(1 + cos(pi·t)) / 2 (arXiv 1608.03983, without restarts).
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    t = (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup)
    falling = 1.0 - t if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * t))
    return schedule.end + (1.0 - schedule.end) * falling
