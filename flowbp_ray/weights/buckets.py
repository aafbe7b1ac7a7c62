"""The trained weights in buckets: whole tensors that are gathered, packed and published together, each by one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BUCKET = 512 * 2**20
"""Bytes of a bucket at most, unless one tensor alone has more: what a rank holds whole at a time while it publishes.

Each object costs Ray about 5 ms beside its copy, which is 50 ms for this many bytes.
"""
ALIGNED = 64
"""Bytes that tensors in one stretch of memory start at multiples of, as those by themselves do."""


@dataclass(frozen=True)
class Bucket:
    """Names of tensors that are published together, and the rank that does."""

    names: tuple[str, ...]
    rank: int


def assign_buckets(nbytes: Mapping[str, int], ranks: int = 1, limit: int | None = None) -> list[Bucket]:
    """Consecutive tensors together, up to `limit` bytes (BUCKET) or a rank's even share, whichever is less.

    Each bucket goes to the rank that has the fewest bytes by then; a rank without any gets an empty one, so that every
    rank answers. All processes that know the sizes find the same.
    """
    most = min(limit or BUCKET, -(-sum(nbytes.values()) // ranks))
    groups: list[list[str]] = []
    filled = 0
    for name, size in nbytes.items():
        if not groups or filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    load, found = [0] * ranks, []
    for names in groups:
        rank = load.index(min(load))
        load[rank] += sum(nbytes[name] for name in names)
        found.append(Bucket(tuple(names), rank))
    idle = set(range(ranks)) - {bucket.rank for bucket in found}
    return found + [Bucket((), rank) for rank in sorted(idle)]


def allocate_contiguous(
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]], device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros in one stretch of memory [bytes] uint8, and in it a tensor of each shape and dtype."""
    at, starts = 0, {}
    for name, (shape, dtype) in tensors.items():
        starts[name] = at
        at += -(-shape.numel() * dtype.itemsize // ALIGNED) * ALIGNED
    whole = torch.zeros(at, dtype=torch.uint8, device=device)
    views = {
        name: whole[starts[name] : starts[name] + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for name, (shape, dtype) in tensors.items()
    }
    return whole, views


@torch.no_grad()
def make_contiguous(parameters: Mapping[str, nn.Parameter]) -> None:
    """Move the parameters of each bucket into one stretch of memory, from which they are published without a copy."""
    dense = {name: p for name, p in parameters.items() if p.is_contiguous()}
    for bucket in assign_buckets({name: p.nbytes for name, p in dense.items()}):
        own = {name: dense[name] for name in bucket.names}
        for device in {p.device for p in own.values()}:
            here = {name: p for name, p in own.items() if p.device == device}
            _, views = allocate_contiguous({name: (p.shape, p.dtype) for name, p in here.items()}, device)
            for name, p in here.items():
                views[name].copy_(p)
                p.data = views[name]
