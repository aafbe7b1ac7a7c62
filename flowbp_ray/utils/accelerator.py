"""The accelerator that processes with `gpus` compute on: the one place that names it.

It is CUDA. The rehearsal (tests/gpu) puts a stand-in into `KIND`, so that the same code runs as on a GPU without one.
torch is imported where it is needed only, because processes that compute nothing read configurations too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

KIND = "cuda"
"""torch's name of the device. What torch knows of it is `torch.get_device_module(KIND)`."""


def available() -> bool:
    """Whether this process sees such a device."""
    return bool(_module().is_available())


def name() -> str:
    """The model of the current device."""
    return str(_module().get_device_name())


def devices() -> list[tuple[str, int]]:
    """Model and bytes of memory of each device that this process sees."""
    found = [_module().get_device_properties(index) for index in range(_module().device_count())]
    return [(str(one.name), int(one.total_memory)) for one in found] if available() else []


def current() -> int:
    """The index of the current device among those that this process sees."""
    return int(_module().current_device())


def choose(assigned: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Make the first of the `assigned` GPUs that this process sees the current one.

    assigned: as Ray names them, entries of CUDA_VISIBLE_DEVICES, or indices where that is not set. Ray leaves that
    variable alone under RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1; a process then sees every GPU of its node, and
    "cuda" would be number 0 in each. Raises ValueError for a GPU that this process does not see.
    """
    if not assigned:
        return
    names = environment.get("CUDA_VISIBLE_DEVICES")
    seen = names.split(",") if names else [str(index) for index in range(_module().device_count())]
    if not set(assigned) <= set(seen):
        raise ValueError(f"Ray assigned GPU {', '.join(assigned)}, but this process sees {', '.join(seen) or 'none'}")
    first = min(seen.index(gpu) for gpu in assigned)
    if first:
        _module().set_device(first)


def _module() -> Any:
    import torch

    return torch.get_device_module(KIND)
