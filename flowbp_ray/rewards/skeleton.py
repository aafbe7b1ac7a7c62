"""What a reward would hold and compute, for plans: its model without weights, and how it looks at pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.rewards import base
from flowbp_ray.rewards.embedding import DTYPES
from flowbp_ray.utils.addresses import existing_path


@dataclass(frozen=True)
class Skeleton:
    """A reward's model on the meta device. Texts are left out: they are read one at a time, without gradient."""

    module: nn.Module
    dtype: torch.dtype
    side: int
    """Pixels a side of what the image tower reads."""
    see: Callable[[Any, Tensor], Tensor] | None = None
    """(module, pixels [B, 3, side, side]) -> anything that has the gradient of the scores; None: `row` is known."""
    row: int = 0
    """Bytes that one image keeps for its backward, where images are scored one at a time; an estimate."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, shared ones counted once."""
        return sum(p.numel() for p in self.module.parameters()) * self.dtype.itemsize


def skeleton(name: str, options: Mapping[str, Any]) -> Skeleton | None:
    """What the reward registered as `name` would be with these options; None where its class does not say.

    It says so in a static method `skeleton`, whose parameters are some of the constructor's. Files that the options
    name need not exist: the published sizes are taken then.
    """
    own = getattr(base.factory(name), "skeleton", None)
    if own is None:
        return None
    given = {
        parameter.name: parameter.default for parameter in inspect.signature(base.factory(name)).parameters.values()
    }
    given |= options
    made: Skeleton | None = own(**{parameter: given[parameter] for parameter in inspect.signature(own).parameters})
    return made


def dtype_of(dtype: str) -> torch.dtype:
    """The torch dtype of `options.dtype`."""
    return DTYPES.get(dtype, torch.float32)


def _tower(width: int, layers: int, heads: int, act: str, **others: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "hidden_act": act} | others


PATCHES = {"patch_size": 14, "image_size": 224}
VIT_L_14: dict[str, Any] = {
    "text_config": _tower(768, 12, 12, "quick_gelu"),
    "vision_config": _tower(1024, 24, 16, "quick_gelu", **PATCHES),
    "projection_dim": 768,
}
"""openai/clip-vit-large-patch14."""
VIT_H_14: dict[str, Any] = {
    "text_config": _tower(1024, 24, 16, "gelu"),
    "vision_config": _tower(1280, 32, 16, "gelu", **PATCHES),
    "projection_dim": 1024,
}
"""laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and with it PickScore and HPSv2.1."""


def clip_skeleton(folder: str | Path | None, published: Mapping[str, Any], dtype: str) -> Skeleton:
    """A CLIP model by the config.json of its folder; by `published` where there is none."""
    from transformers import CLIPConfig, CLIPModel

    found = None if folder is None else existing_path(folder)
    if found is not None and (found / "config.json").is_file():
        config: Any = CLIPConfig.from_pretrained(str(found), local_files_only=True)
    else:
        config = CLIPConfig(**published)
    with torch.device("meta"):
        model: Any = CLIPModel(config).eval().requires_grad_(False)
    return Skeleton(model, dtype_of(dtype), config.vision_config.image_size, _clip_features)


def _clip_features(model: Any, pixels: Tensor) -> Tensor:
    from flowbp_ray.rewards.clip_folder import image_features

    return image_features(model, pixels)
