"""A process group between stand-ins: torch.distributed's backend `standin`, which hands their host memory to gloo.

Like NCCL it takes contiguous tensors of its devices only, and no host waits for what it does.
"""

from __future__ import annotations

import ctypes
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.gpu import standin

NAME = "standin"
OPERATIONS = {
    **{name: name for name in ("broadcast", "allreduce", "reduce", "allgather", "reduce_scatter", "alltoall")},
    "all_gather_single": "_allgather_base",
    "_allgather_base": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "_reduce_scatter_base": "_reduce_scatter_base",
}
"""What torch asks a group for (its versions differ in names), and gloo's name of it."""


class HostGroup(dist.ProcessGroup):
    """Ranks that compute on stand-ins, each in a process of its own."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        kind: Any = dist.ProcessGroupGloo  # whose stub lacks this way of making it
        self.gloo = kind(store, rank, size, timeout)

    def barrier(self, opts: Any = None) -> Any:
        return self.gloo.barrier()

    def shutdown(self) -> None:
        self.gloo.shutdown()

    def abort(self) -> None:
        self.gloo.abort()


def _handing(name: str) -> Any:
    def operation(self: HostGroup, *given: Any) -> Any:
        return getattr(self.gloo, name)(*tree_map_only(Tensor, on_host, given))

    return operation


for _asked, _done in OPERATIONS.items():
    setattr(HostGroup, _asked, _handing(_done))


def on_host(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the host. Raises RuntimeError for what NCCL refuses."""
    if tensor.device.type != standin.KIND:
        raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
    if not tensor.is_contiguous():
        raise RuntimeError("Tensors must be contiguous")
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # lives as long as the view does
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def register() -> None:
    """Make the backend known to torch.distributed, for the stand-in's devices."""
    dist.Backend.register_backend(NAME, HostGroup, devices=[standin.KIND])
