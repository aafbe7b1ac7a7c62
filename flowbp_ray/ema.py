"""An exponential moving average of the trained weights: fp32, one update per step, sharded as the masters are.

average <- decay · average + (1 − decay) · weights
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

PIECE = 1 << 24
"""Elements that are swapped at a time: more than that is never there twice."""


class Ema:
    """The average of one rank's shards. It starts as a copy of them."""

    def __init__(self, shards: Sequence[Tensor], decay: float) -> None:
        """shards: the rank's fp32 masters, whole or flat partitions; the same list, in the same order, every time."""
        self.decay = decay
        self.average = [shard.detach().clone() for shard in shards]

    @torch.no_grad()
    def update(self, shards: Sequence[Tensor]) -> None:
        torch._foreach_lerp_(self.average, [shard.detach() for shard in shards], 1.0 - self.decay)

    @contextmanager
    def swapped(self, shards: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the shards hold the average and `average` the weights; whoever gathers then gathers the average."""
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
