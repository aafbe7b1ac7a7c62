"""A checksum of weights that is additive over shards, so that learners compute theirs without gathering anything.

For a tensor with bits b[i] (its elements read as signed integers of their width): sum of b[i] · (2·i + 1) modulo 2^64.
The sum over fragments, each with its own offset, is the sum over the whole. An element that is moved, missing, stale or
averaged changes it. It protects against mistakes, not against an adversary; for a sha256 see
`flowbp_ray.utils.digest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flowbp_ray.utils.checksums import TensorChecksum, combine

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements at a time on a device
_HOST_CHUNK = 1 << 16  # on the host, where such a chunk of 64-bit integers fits the cache


@torch.no_grad()
def checksum(fragment: Tensor, start: int = 0) -> int:
    """The checksum (signed, 64 bits) of a fragment whose first element is number `start` of the whole flat tensor."""
    flat = fragment.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    if bits.device.type == "cpu":
        return _on_host(bits.numpy(), start)
    weights = _odd_weights(bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for at in range(0, len(bits), _CHUNK):
        part = bits[at : at + _CHUNK].to(torch.int64, copy=True)
        total += 2 * (start + at) * part.sum() + part.mul_(weights[: len(part)]).sum()
    return int(total)


def _on_host(bits: np.ndarray, start: int) -> int:
    """The same in numpy, which multiplies and adds in one pass, and calls of which take a fifth of torch's time.

    bits: [n] signed integers. The sums are those of unsigned integers, which numpy takes modulo 2^64.
    """
    weights = _odd_weights_on_host()
    total = 0
    for at in range(0, len(bits), _HOST_CHUNK):
        part = bits[at : at + _HOST_CHUNK].astype(np.int64).view(np.uint64)
        total += int(np.dot(part, weights[: len(part)]))
        if start + at:
            total += 2 * (start + at) * int(part.sum())
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@lru_cache(maxsize=8)
def _odd_weights(device: torch.device) -> Tensor:
    return 2 * torch.arange(_CHUNK, device=device) + 1


@lru_cache(maxsize=1)
def _odd_weights_on_host() -> np.ndarray:
    return 2 * np.arange(_HOST_CHUNK, dtype=np.uint64) + 1


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of whole tensors by name: 16 hex digits."""
    return combine([{name: TensorChecksum.of(tensor, checksum(tensor)) for name, tensor in tensors.items()}])
