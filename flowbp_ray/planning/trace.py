"""The memory and operations of a computation, found by running it on tensors that have shapes and no memory.

The tensors are PyTorch's fake ones: they say they are on the CPU, so that attention takes the CPU's flash kernel. It
keeps what the GPU's flash kernels keep (q, k, v, the output, one number per row), linear in the tokens. A kernel that
keeps the matrix of attention instead is asked for with `sdpa_kernel(SDPBackend.MATH)` around the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from flowbp_ray.utils.memory_meter import LiveBytes
from flowbp_ray.weights.trainable import trained


@dataclass(frozen=True)
class Cost:
    """What one forward (and its backward) takes, without parameters, their gradients and the inputs."""

    saved: int
    """Bytes held between forward and backward."""
    peak: int
    """The most bytes held at any moment."""
    flops: int
    """Operations of matrix products, convolutions and attention; a multiply-add counts two."""


class _Meter(LiveBytes):
    """Counts operations beside bytes. FlopCounterMode itself tracks modules too, and fails in checkpointed ones."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def _flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


def fake_mode() -> FakeTensorMode:
    """Inside it every new tensor is a fake one."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def hollow(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with fake tensors for its parameters and buffers, in `dtype`. Inside a `fake_mode` only."""
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                owner._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
        for name, b in owner._buffers.items():
            if b is not None:
                owner._buffers[name] = torch.empty(b.shape, dtype=dtype if b.is_floating_point() else b.dtype)
    return module


def cost_of(forward: Callable[[], Tensor], held: Iterable[Tensor], differentiate: bool) -> Cost:
    """The cost of `forward` and, where asked, of the backward of the sum of what it returns. Inside a `fake_mode` only.

    held: tensors that exist before and do not count.
    """
    meter = _Meter(ignored=held)
    with meter, torch.set_grad_enabled(differentiate):
        out = forward()
        saved = meter.live
        if differentiate:
            (out.float() * torch.empty(out.shape)).sum().backward()
    return Cost(saved, meter.peak, meter.flops)


def held_by(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and gradients of trained parameters, which are made here: they exist when a node begins."""
    for p in trained(module).values():
        p.grad = torch.empty_like(p)
    return [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
