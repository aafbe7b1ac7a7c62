"""Bytes of the transformer's weights as a process holds them, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from torch import nn

from flowbp_ray.backbones.quantised import Quantization, quantised_bytes
from flowbp_ray.config.sections import BackboneConfig
from flowbp_ray.planning.costs import Costs


@dataclass(frozen=True)
class Linears:
    """The weights of a model's linear layers, which quantisation replaces."""

    elements: int
    largest: int
    """Elements of the largest weight."""
    codes: Mapping[str, int]
    """Quantisation -> bytes of all codes and scales."""

    @classmethod
    def of(cls, module: nn.Module) -> Linears:
        """Counted in a module without adapters, on any device."""
        shapes = [layer.weight.shape for layer in module.modules() if isinstance(layer, nn.Linear)]
        kinds: tuple[Quantization, ...] = get_args(Quantization)
        codes: dict[str, int] = {kind: sum(quantised_bytes(shape, kind) for shape in shapes) for kind in kinds}
        return cls(sum(s.numel() for s in shapes), max((s.numel() for s in shapes), default=0), codes)


def linears_of(costs: Costs) -> Linears:
    """The linear layers of the model of `costs`, counted once."""
    return costs.once(("linears",), lambda: Linears.of(costs.backbone.skeleton()))


def base_bytes(model: BackboneConfig, transformer: int, linears: Linears | None) -> int:
    """Bytes of all weights. transformer: their number, adapters included.

    With quantisation one layer is dense for the time of its product; it is counted.
    """
    item = model.torch_dtype.itemsize
    if model.quantization is None:
        return transformer * item
    assert linears is not None
    return (transformer - linears.elements + linears.largest) * item + linears.codes[model.quantization]
