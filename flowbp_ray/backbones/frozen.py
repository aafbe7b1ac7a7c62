"""The base that adapters are trained over: loaded once per process, quantised if wanted, shared by its roles."""

from __future__ import annotations

import copy

from torch import nn

from flowbp_ray.backbones.base import Backbone
from flowbp_ray.backbones.quantised import quantise
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import BackboneConfig


def load_base(backbone: Backbone, config: BackboneConfig, device: str, shared: nn.Module | None = None) -> nn.Module:
    """The transformer of `config`, in eval mode: loaded, or over the tensors of a `shared` one (see `shared_copy`).

    Without quantisation it is on the CPU. With it, its linear layers are on `device` and quantised there one after the
    other: the host holds the dense model while it is read, the device never more than one dense layer of it.
    """
    if shared is not None:
        return shared_copy(shared)
    transformer = backbone.load_transformer(config.torch_dtype)
    return quantise(transformer, config.quantization, device) if config.quantization else transformer


def shared_base(config: RunConfig) -> nn.Module | None:
    """The frozen base for sampler and learner of one process, on their device; None if they do not share it."""
    if not config.cluster.share_base:
        return None
    device = config.learners.device
    return load_base(build_backbone(config.backbone), config.backbone, device).requires_grad_(False).to(device)


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the tree of modules over the same parameters and buffers.

    Modes, hooks and adapters that are added to one tree are not in the other. Nobody may change the tensors.
    """
    copied: nn.Module = copy.deepcopy(module, {id(t): t for t in [*module.parameters(), *module.buffers()]})
    return copied
