"""The registry of model families by name."""

from __future__ import annotations

from flowbp_ray.backbones.base import Backbone, SigmaGrid
from flowbp_ray.backbones.flux1 import Flux1Backbone
from flowbp_ray.backbones.flux2 import Flux2Backbone
from flowbp_ray.backbones.qwen_image import QwenImageBackbone
from flowbp_ray.backbones.sd35 import SD35Backbone
from flowbp_ray.backbones.shapes import ShapesBackbone
from flowbp_ray.config.sections import BackboneConfig
from flowbp_ray.utils.errors import nearest

BACKBONES: dict[str, type[Backbone]] = {
    backbone.name: backbone
    for backbone in (ShapesBackbone, SD35Backbone, Flux1Backbone, Flux2Backbone, QwenImageBackbone)
}
"""A new family is one file and one line here."""


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build the family that a configuration names. Weights are loaded later, part by part.

    Raises ValueError for an unknown name, or a path that is not a folder of this family.
    """
    return backbone_named(config.name, config.path, config.sigmas)


def backbone_named(name: str, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> Backbone:
    """Build the family `name`, with the weights in the diffusers folder `path` (None: the embedded ones).

    sigma_grid: the noise levels, see `SigmaGrid`. Raises ValueError as `build_backbone` does.
    """
    if name not in BACKBONES:
        raise ValueError(nearest(name, list(BACKBONES), "backbone"))
    return BACKBONES[name](path, sigma_grid)
