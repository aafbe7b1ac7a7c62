"""sha256 of tensors and of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flowbp_ray.utils.files import cached_file_fact


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names; equal digests mean equal bits."""
    return digest_of_parts([tensors])


def digest_of_parts(parts: Iterable[Mapping[str, Tensor]]) -> str:
    """`digest` of tensors that come in parts; the parts must be in the order of the names."""
    seen = hashlib.sha256()
    for tensors in parts:
        for name in sorted(tensors):
            tensor = tensors[name].detach().contiguous().cpu()
            seen.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # in place: it may be a mapped file
    return seen.hexdigest()


def sha256_of_file(file: Path) -> str:
    """Hex sha256 of a file's contents, read 256 KiB at a time into one buffer.

    Not in larger parts: checkpoints are read back in threads, and glibc keeps in an arena per thread what was freed.
    """
    found, part = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(part):
            found.update(part[:count])
    return found.hexdigest()


def file_digest(file: Path, memory: Path | None) -> str:
    """Hex sha256 of a file's contents; for a large file the result is cached in the folder `memory`."""
    return cached_file_fact(file, memory, "sha256", sha256_of_file)
