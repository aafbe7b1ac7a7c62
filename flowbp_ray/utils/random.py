"""Random streams with the key (run seed, purpose, step, sample index). A stream depends only on its key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["prompt", "noise", "plan", "renoise"]
_PURPOSES: dict[str, int] = {"prompt": 1, "noise": 2, "plan": 3, "renoise": 4}
_WORD = 0xFFFFFFFF


def stream(seed: int, purpose: Purpose, step: int, index: int | None = None) -> np.random.Generator:
    """Return the generator of a key. It is counter-based (Philox), so any process can create any stream directly."""
    if purpose not in _PURPOSES:
        raise ValueError(f"purpose must be one of {', '.join(_PURPOSES)}, got {purpose}")
    if seed < 0 or step < 0 or (index is not None and index < 0):
        raise ValueError(f"seed, step and index must not be negative, got {seed}, {step}, {index}")
    words = [_PURPOSES[purpose]]
    # Two words per number: with a fixed length, different keys always give different entropy.
    for number in (seed, step, 0 if index is None else index + 1):
        words += [number & _WORD, (number >> 32) & _WORD]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def normal(shape: Sequence[int], seed: int, purpose: Purpose, step: int, indices: Sequence[int]) -> Tensor:
    """Standard normal noise, fp32 [len(indices), *shape]. Row i is drawn from the stream of indices[i] only."""
    rows = [stream(seed, purpose, step, i).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def use_deterministic_kernels() -> None:
    """Make torch use deterministic kernels, or raise. Call it before the first computation on a GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
