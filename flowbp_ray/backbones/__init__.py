"""Model families behind one interface; `registry.build_backbone` builds the one that a configuration names."""

from flowbp_ray.backbones.base import Backbone, Conditioning, Encode
from flowbp_ray.backbones.embeddings import Embeddings, encode_all
from flowbp_ray.backbones.registry import BACKBONES

__all__ = ["BACKBONES", "Backbone", "Conditioning", "Embeddings", "Encode", "encode_all"]
