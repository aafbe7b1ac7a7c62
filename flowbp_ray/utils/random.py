"""Random streams with the key (run seed, purpose, step, sample index). A stream depends only on its key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # judges draw too, and their processes do without torch
    from torch import Tensor

Purpose = Literal["prompt", "noise", "plan", "renoise", "times", "forward"]
_PURPOSES: dict[str, int] = {"prompt": 1, "noise": 2, "plan": 3, "renoise": 4, "times": 5, "forward": 6}
ListPurpose = Literal["jitter", "judge_seed", "judge_retry"]
_LIST_PURPOSES: dict[str, tuple[int, int]] = {
    "jitter": (0x6A697474, 1),  # key: run seed, step, sample, branch
    "judge_seed": (0x6A756467, 0),  # key: what names the picture, number of the try if an unparsable answer came before
    "judge_retry": (0x6A756468, 0),  # key: what names the picture, number of the try
}
"""Purpose -> (number, place of the number in the list of words): see `stream_of_list`."""
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


def stream_of_list(purpose: ListPurpose, *key: int) -> np.random.Generator:
    """The generator (PCG64) of a key of any length: its words as they are, with the purpose's number among them.

    Other streams than those of `stream`, with a key that need not have its four parts.
    """
    if purpose not in _LIST_PURPOSES:
        raise ValueError(f"purpose must be one of {', '.join(_LIST_PURPOSES)}, got {purpose}")
    number, place = _LIST_PURPOSES[purpose]
    return np.random.default_rng([*key[:place], number, *key[place:]])


def normal(shape: Sequence[int], seed: int, purpose: Purpose, step: int, indices: Sequence[int]) -> Tensor:
    """Standard normal noise, fp32 [len(indices), *shape]. Row i is drawn from the stream of indices[i] only."""
    import torch

    rows = [stream(seed, purpose, step, i).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def use_deterministic_kernels() -> None:
    """Make torch use deterministic kernels, or raise. Call it before the first computation on a GPU.

    New memory is not filled with a value first, which torch would do to show reads of it: that takes time and changes
    nothing here, because no result depends on memory that was not written.
    """
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
