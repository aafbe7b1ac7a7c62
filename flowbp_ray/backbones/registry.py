"""The model families by name."""

from __future__ import annotations

import difflib

from flowbp_ray.backbones.base import Backbone
from flowbp_ray.backbones.flux1 import Flux1Backbone
from flowbp_ray.backbones.flux2 import Flux2Backbone
from flowbp_ray.backbones.qwen_image import QwenImageBackbone
from flowbp_ray.backbones.sd35 import SD35Backbone
from flowbp_ray.backbones.shapes import ShapesBackbone

BACKBONES: dict[str, type[Backbone]] = {
    backbone.name: backbone
    for backbone in (ShapesBackbone, SD35Backbone, Flux1Backbone, Flux2Backbone, QwenImageBackbone)
}
"""A new family is one file and one line here."""


def backbone_named(name: str, path: str | None = None) -> Backbone:
    """The backbone called `name`, reading its weights from the diffusers folder `path` (None: the embedded ones)."""
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known backbones: {', '.join(sorted(BACKBONES))}"
        raise ValueError(f"unknown backbone {name!r}; {hint}")
    return BACKBONES[name](path)
