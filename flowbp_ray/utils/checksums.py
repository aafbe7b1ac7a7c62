"""Checksums of tensors that several ranks hold in parts, and the fingerprint that they make together; without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorChecksum:
    """One rank's checksum of one tensor. shape, dtype: of the whole tensor; value: of the rank's own fragments."""

    shape: tuple[int, ...]
    dtype: str
    value: int

    @classmethod
    def of(cls, tensor: Tensor, value: int) -> TensorChecksum:
        return cls(tuple(tensor.shape), str(tensor.dtype), value)


def combine(ranks: Sequence[Mapping[str, TensorChecksum]]) -> str:
    """Combine the ranks' checksums into the fingerprint of the weights (16 hex digits), whatever the names' order."""
    lines = []
    for name, first in sorted(ranks[0].items()):
        value = (sum(rank[name].value for rank in ranks) + (1 << 63)) % (1 << 64) - (1 << 63)
        lines.append(f"{name} {first.shape} {first.dtype} {value}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
