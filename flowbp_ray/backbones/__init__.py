"""Model families behind one interface; `get` finds one by name."""

from __future__ import annotations

import difflib

from flowbp_ray.backbones.base import Backbone, Conditioning, Encode
from flowbp_ray.backbones.embeddings import Embeddings, distinct, encode_all
from flowbp_ray.backbones.flux1 import Flux1Backbone
from flowbp_ray.backbones.flux2 import Flux2Backbone
from flowbp_ray.backbones.qwen_image import QwenImageBackbone
from flowbp_ray.backbones.sd35 import SD35Backbone
from flowbp_ray.backbones.shapes import ShapesBackbone

__all__ = ["BACKBONES", "Backbone", "Conditioning", "Embeddings", "Encode", "distinct", "encode_all", "get"]
