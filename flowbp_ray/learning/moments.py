"""AdamW's state of one tensor, as optimizers hold it and as checkpoints do: torch's in fp32, or int8 (bitsandbytes).

In int8, bitsandbytes keeps `state1` and `state2` (uint8) with `absmax1`, `absmax2` per block of 256 and the values that
the numbers stand for in `qmap1`, `qmap2`; small tensors in fp32 under the same names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowbp_ray.run.engine_state import CODES, MOMENTS, SCALES, EngineState
from flowbp_ray.utils.errors import ConfigError


def moments_of(optimizer: torch.optim.Optimizer, p: Tensor) -> tuple[int, dict[str, Tensor]]:
    """The updates that `p` has taken, and its moments by kind, flat and without copying; (0, {}) before the first."""
    state = optimizer.state.get(p)
    if not state:
        return 0, {}
    found: dict[str, Tensor] = {}
    for number, kind in enumerate(MOMENTS, 1):
        moment = found[kind] = state[kind if kind in state else f"state{number}"].detach().view(-1)
        if moment.dtype == torch.uint8:
            found[kind + SCALES], found[kind + CODES] = state[f"absmax{number}"], state[f"qmap{number}"]
    return int(state["step"]), found


def begin_moments(optimizer: torch.optim.Optimizer, p: Tensor, updates: int) -> dict[str, Tensor]:
    """Make `p` one that has taken so many updates; return its fp32 moments by kind, flat, zero and to be filled.

    Tensors that exist are kept, since DeepSpeed holds views of them.
    """
    state: dict[str, Any] = optimizer.state[p]
    if not updates and not state:
        return {}
    group = optimizer.param_groups[0]
    counted_there = bool(group.get("fused") or group.get("capturable"))  # where torch has the counter
    state["step"] = torch.tensor(float(updates), device=p.device if counted_there else "cpu")
    for kind in MOMENTS:
        state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(p, memory_format=torch.preserve_format)
    return {kind: state[kind].view(-1) for kind in MOMENTS}


def load_moments(optimizer: torch.optim.Optimizer, p: Tensor, saved: EngineState, name: str, int8: bool) -> None:
    """Set the moments of the whole parameter `p` to the saved ones. int8: the optimizer is that of bitsandbytes.

    What is saved in int8 is read with the same bits in int8, and as code · scale otherwise. Raises ConfigError where
    the optimizer quantises and the saved moments are fp32.
    """
    updates = saved.updates(name)
    if not int8:
        for kind, moment in begin_moments(optimizer, p, updates).items():
            saved.fill(moment, kind, name)
        return
    optimizer.state.pop(p, None)
    if updates:
        optimizer.state[p] = {"step": updates} | _int8_state(p, saved, name)


def _int8_state(p: Tensor, saved: EngineState, name: str) -> dict[str, Tensor]:
    from flowbp_ray.learning.optim import SMALLEST_QUANTISED

    state: dict[str, Tensor] = {}
    for number, kind in enumerate(MOMENTS, 1):
        if saved.quantised(kind, name) != (p.numel() >= SMALLEST_QUANTISED):
            raise ConfigError(f"{saved.folder} has moments in fp32; write learners.optimizer.moments=fp32")
        state[f"state{number}"] = saved.stored(kind, name).view(p.shape).to(p.device, copy=True)
        if saved.quantised(kind, name):
            state[f"absmax{number}"] = saved.stored(kind + SCALES, name).to(p.device, copy=True)
            state[f"qmap{number}"] = saved.stored(kind + CODES, name).to(p.device, copy=True)
    return state
