"""A frozen base in 8 or 4 bits, over which adapters are trained (QLoRA, arXiv 2305.14314).

Every linear layer of the transformer keeps codes and scales in place of its weight, and makes the dense weight again
for the time of a product: in the forward, and once more in the backward, so that no dense copy waits between them. The
layer is the linear function of its dequantised weight, forwards and backwards, with or without gradient. Samplers and
learners therefore compute the same velocities, as the surrogate needs.

Both formats and their kernels are bitsandbytes'. `nf4` gives the weights that diffusers' `BitsAndBytesConfig(
load_in_4bit=True, bnb_4bit_quant_type="nf4")` gives. Its own layers are not used: `Linear8bitLt` rounds activations to
8 bits too, and differently in training and evaluation; diffusers refuses both without a GPU. torchao's 8-bit layer
keeps each dense weight from the forward to the backward.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flowbp_ray.utils.errors import need_package

Quantization = Literal["int8", "nf4"]
BLOCK = 64
"""Weights of one scale in nf4; in int8 it is a row. The same as bitsandbytes' default."""


class QuantisedLinear(nn.Linear):
    """A frozen linear layer from quantised weights.

    Codes and scales are buffers of bytes, so that casting a module leaves them as they are, and no part of its state:
    they are made again from the model's folder. `weight` is empty; it tells peft and diffusers the dtype and device.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, dense: nn.Linear, kind: Quantization, device: torch.device | str) -> None:
        """Quantise the weight [out, in] of `dense` on `device`. Raises ValueError for weights that int8 cannot hold."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = dense.in_features, dense.out_features, kind
        weight = dense.weight.detach().to(device)
        self.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)
        bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().to(device), requires_grad=False)
        self.register_parameter("bias", bias)
        codes, scales = _QUANTISE[kind](weight)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales.contiguous().view(torch.uint8), persistent=False)

    def dense(self) -> Tensor:
        """The dequantised weight [out, in], in the layer's dtype."""
        return dequantise(self.codes, self.scales, *self._how())

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _Product.apply(input, self.codes, self.scales, self.bias, *self._how())
        return out

    def _how(self) -> tuple[Quantization, tuple[int, int], torch.dtype]:
        return self.kind, (self.out_features, self.in_features), self.weight.dtype

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


def dequantise(codes: Tensor, scales: Tensor, kind: Quantization, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense weight of `shape` [out, in]. scales: the bytes of fp32 numbers, [rows or blocks · 4] uint8."""
    scales = scales.view(torch.float32)
    if kind == "int8":  # rounded once, from fp32
        return torch.mul(codes, scales[:, None] / 127, out=torch.empty(shape, dtype=dtype, device=codes.device))
    # as one row where blocks go on in the next: the kernel for AVX-512 would begin each row with a block of its own
    one = (1, shape[0] * shape[1]) if shape[1] % BLOCK else shape
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, kind, one, dtype)
    return dense.reshape(shape)


class _Product(torch.autograd.Function):
    """x [..., in] times the transposed weight, plus the bias; the backward dequantises again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.how = how
        return linear(x, dequantise(codes, scales, *how), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient @ dequantise(*ctx.saved_tensors, *ctx.how), *(None,) * 6


def quantise(module: nn.Module, kind: Quantization, device: torch.device | str = "cpu") -> nn.Module:
    """Replace every linear layer of `module`, as diffusers does, by a quantised one on `device`.

    Raises ValueError if there is none.
    """
    places = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not places:
        raise ValueError(f"the model has no linear layer to quantise in {kind}; write backbone.quantization=null")
    for name, _ in places:
        owner, _, own = name.rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, own, QuantisedLinear(getattr(parent, own), kind, device))
    return module


def quantised_bytes(weight: torch.Size, kind: Quantization) -> int:
    """Bytes of codes and scales of a weight [out, in]."""
    count = weight.numel()
    return count + 4 * weight[0] if kind == "int8" else -(-count // 2) + 4 * -(-count // BLOCK)


def check_library(kind: Quantization | None) -> None:
    """Raises ValueError if quantisation is wanted and its library is not installed."""
    if kind:
        need_package(f"backbone.quantization={kind}", "bitsandbytes", "quant")


def _library() -> Any:
    from bitsandbytes import functional

    return functional


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] int8 and the largest magnitude of each row [out] fp32 (LLM.int8, arXiv 2208.07339, eq. 3)."""
    codes, scales, _ = _library().int8_vectorwise_quant(weight.half())
    if not torch.isfinite(scales).all():
        raise ValueError("backbone.quantization=int8 cannot hold weights above 65504; write backbone.quantization=nf4")
    return codes, scales


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes [out·in / 2, 1] uint8 and the largest magnitude of each block [out·in / BLOCK] fp32."""
    codes, state = _library().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return codes, state.absmax


_QUANTISE = {"int8": _int8, "nf4": _nf4}
