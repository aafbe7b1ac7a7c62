"""Random weights at a size: the transformer of a learner, and the decoder and reward that a K-graph needs beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sizes import Size
from flowbp_ray.backbones.base import unit_images
from flowbp_ray.backbones.pipeline import PipelineBackbone, diffusers_class
from flowbp_ray.rewards.objective import RewardTerm, score_and_cotangent
from flowbp_ray.rewards.preprocess import normalise


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside are initialised on `device` in `dtype`: large ones never exist in host memory or in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


class ClipReward:
    """The cosine of an image's CLIP embedding and its prompt's; texts are embedded once, so theirs are given."""

    name = "clip"

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        with made_on(device, dtype):
            tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        self.tower: Any = tower.to(device, dtype).requires_grad_(False).train()
        self.text = torch.randn(self.tower.config.projection_dim, generator=torch.Generator().manual_seed(3))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> [B] fp32, all against the same text."""
        weight, side = self.tower.visual_projection.weight, self.tower.config.image_size
        small = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
        embedding = self.tower(pixel_values=normalise(small).to(weight.dtype)).image_embeds.float()
        return F.cosine_similarity(embedding, self.text.to(embedding.device)[None], dim=1)


class Scoring:
    """Decoder and reward in the dtype of the run. A learner of ours does not hold them; a K-graph must."""

    def __init__(self, size: Size, backbone: PipelineBackbone, device: torch.device, dtype: torch.dtype) -> None:
        assert size.vision is not None
        with made_on(device, dtype):
            vae = diffusers_class(backbone.vae_class).from_config(backbone.vae_config)
        self.vae: Any = vae.to(device, dtype).requires_grad_(False).train()
        self.backbone, self.dtype = backbone, dtype
        self.reward = ClipReward(size.vision, device, dtype)
        self.modules: tuple[nn.Module, ...] = (self.vae, self.reward.tower)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, ...] -> images [B, 3, H, W] in 0..1, differentiable."""
        return unit_images(self.backbone.decode(self.vae, latents.to(self.dtype)))

    def loss(self, target: Tensor) -> Tensor:
        """mean(relu(1 − r)) of targets [B, 1, ...], by autograd: decoder, reward and all before them in one graph."""
        return torch.relu(1.0 - self.reward.score(self.decode(target[:, 0]), [])).mean()

    def cotangent(self, target: Tensor) -> Tensor:
        """The gradient of `loss` at targets [B, 1, ...] as a reward server computes it: the same shape, fp32."""
        rows = len(target)
        terms = [(RewardTerm(self.reward.name), self.reward)]
        found = score_and_cotangent(target, self.decode, terms, [""] * rows, torch.ones(rows), rows, micro_batch=1)
        return found.cotangent

    def to(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device)


@dataclass(frozen=True)
class Models:
    """The transformer of a size on `device` in `dtype`, in train mode; scoring is None for a size without a reward."""

    size: Size
    backbone: PipelineBackbone
    device: torch.device
    dtype: torch.dtype
    pixels: int
    transformer: Any
    scoring: Scoring | None

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.transformer.parameters())

    def checkpointing(self, on: bool) -> None:
        """Recompute the blocks of the transformer, the decoder and the reward in the backward, or keep them all."""
        for module in (self.transformer, self.scoring and self.scoring.vae):
            if module is not None:
                module.enable_gradient_checkpointing() if on else module.disable_gradient_checkpointing()
        if self.scoring is not None:
            tower = self.scoring.reward.tower
            tower.gradient_checkpointing_enable() if on else tower.gradient_checkpointing_disable()

    def hold_scoring(self, here: bool) -> None:
        """Decoder and reward on the device, as a K-graph needs them, or in host memory, away from the learner's."""
        if self.scoring is not None:
            self.scoring.to(self.device if here else torch.device("cpu"))


def build(size: Size, device: torch.device, dtype: torch.dtype, pixels: int) -> Models:
    """Seeded random weights. Raises ValueError where the family cannot draw pixels × pixels."""
    backbone = size.backbone()
    backbone.latent_shape(pixels, pixels)
    torch.manual_seed(0)
    with made_on(device, dtype):
        transformer = diffusers_class(backbone.transformer_class).from_config(backbone.transformer_config)
    transformer.to(device, dtype).train()
    scoring = None if size.vision is None else Scoring(size, backbone, device, dtype)
    return Models(size, backbone, device, dtype, pixels, transformer, scoring)
