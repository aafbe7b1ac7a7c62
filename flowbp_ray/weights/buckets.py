"""Buckets of the trained weights: whole tensors that one rank gathers, packs and publishes together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowbp_ray.utils.device_memory import release_cached

BUCKET = 512 * 2**20
"""The most bytes of a bucket, unless a single tensor has more. A rank holds one whole bucket while it publishes.

Ray needs about 5 ms per object, and 50 ms to copy this many bytes.
"""
ALIGNED = 64
"""The alignment in bytes of tensors within contiguous memory, the same as torch's for separate tensors."""


@dataclass(frozen=True)
class Bucket:
    """The names of tensors that are published together, and the rank that publishes them."""

    names: tuple[str, ...]
    rank: int


def assign_buckets(nbytes: Mapping[str, int], ranks: int = 1, limit: int | None = None) -> list[Bucket]:
    """Group consecutive tensors into buckets of at most `limit` bytes (BUCKET), or a rank's even share if that is less.

    Each bucket goes to the rank that has the fewest bytes so far. A rank without a bucket gets an empty one, so that
    every rank publishes. The result depends on the arguments only: all processes compute the same.
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


def offsets(nbytes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """The first byte of each tensor in contiguous memory, and the bytes of all, aligned to ALIGNED."""
    at, starts = 0, {}
    for name, size in nbytes.items():
        starts[name] = at
        at += -(-size // ALIGNED) * ALIGNED
    return starts, at


def allocate_contiguous(
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]], device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Allocate zeros [bytes] uint8 and, as views of this memory, a tensor of each shape and dtype; return both."""
    starts, total = offsets({name: shape.numel() * dtype.itemsize for name, (shape, dtype) in tensors.items()})
    whole = torch.zeros(total, dtype=torch.uint8, device=device)
    views = {
        name: whole[starts[name] : starts[name] + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for name, (shape, dtype) in tensors.items()
    }
    return whole, views


@torch.no_grad()
def move_together(parameters: Mapping[str, nn.Parameter], device: torch.device) -> Tensor:
    """Move parameters of one device into one array [bytes] uint8 with the offsets of `offsets`; return it."""
    whole, views = allocate_contiguous({name: (p.shape, p.dtype) for name, p in parameters.items()}, device)
    for name, p in parameters.items():
        views[name].copy_(p)
        p.data = views[name]
    return whole


@torch.no_grad()
def make_contiguous(parameters: Mapping[str, nn.Parameter]) -> None:
    """Move the parameters of each bucket into contiguous memory, from which they are published without a copy."""
    dense = {name: p for name, p in parameters.items() if p.is_contiguous()}
    for bucket in assign_buckets({name: p.nbytes for name, p in dense.items()}):
        own = {name: dense[name] for name in bucket.names}
        for device in {p.device for p in own.values()}:
            move_together({name: p for name, p in own.items() if p.device == device}, device)
    for kind in {p.device.type for p in dense.values()}:  # once: where they lay before is of use to other processes
        release_cached(kind)


@dataclass(frozen=True)
class Blocks:
    """The trained weights as the few arrays in which they are broadcast: one per bucket, tensors at `offsets`.

    It depends on the names and sizes only, so learners and samplers compute the same one.
    """

    buckets: tuple[Bucket, ...]
    nbytes: Mapping[str, int]

    @classmethod
    def of(cls, nbytes: Mapping[str, int]) -> Blocks:
        """nbytes: bytes of each trained tensor, in the module's order."""
        return cls(tuple(assign_buckets(nbytes)), dict(nbytes))

    @property
    def digest(self) -> str:
        """sha256 of names, sizes and division, by which two processes find out whether theirs is the same."""
        said = [[(name, self.nbytes[name]) for name in bucket.names] for bucket in self.buckets]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def offsets(self, bucket: Bucket) -> tuple[dict[str, int], int]:
        """The first byte of each tensor in the bucket's array, and the array's bytes."""
        return offsets({name: self.nbytes[name] for name in bucket.names})

    def size(self, bucket: Bucket) -> int:
        """Bytes of the bucket's array."""
        return self.offsets(bucket)[1]

    @property
    def total(self) -> int:
        """Bytes of all arrays."""
        return sum(self.size(bucket) for bucket in self.buckets)
