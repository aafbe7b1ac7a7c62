"""Memory of a GPU that a process has and does not use: how torch takes it, and giving it back to other processes."""

from __future__ import annotations

from collections.abc import Mapping

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""The variable of torch's CUDA allocator, which goes before the newer PYTORCH_ALLOC_CONF where both are set."""
NAMES = (ALLOCATOR, "PYTORCH_ALLOC_CONF")


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for the allocator of a process with a GPU: the user's own, or segments that grow.

    Segments of fixed size keep what no other size can use; those that grow are one, and what is free in them can be
    given back (https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage). They must be set before
    torch first uses the GPU.
    """
    own = {name: environment[name] for name in NAMES if name in environment}
    return own or {ALLOCATOR: "expandable_segments:True"}


def release_cached(device: str) -> None:
    """Give the memory back that torch has cached on `device` and holds no tensor in. On the CPU there is no cache."""
    if device == "cpu":
        return
    import torch

    torch.get_device_module(device).empty_cache()
