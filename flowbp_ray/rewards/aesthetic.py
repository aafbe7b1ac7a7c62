"""LAION's aesthetic score, how much people like an image whatever the prompt: a linear head on CLIP ViT-L/14.

The improved predictor, github.com/christophschuhmann/improved-aesthetic-predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPConfig

from flowbp_ray.rewards.clip_folder import check_clip_model, check_model, image_embedder, load_clip
from flowbp_ray.rewards.embedding import check_pairs, tower_dtype
from flowbp_ray.rewards.files import check_file, fill, read_checkpoint
from flowbp_ray.rewards.skeleton import VIT_L_14, Skeleton, clip_skeleton

WHAT = "LAION's head sac+logos+ava1-l14-linearMSE.pth, from improved-aesthetic-predictor on GitHub"
CLIP = "the folder of openai/clip-vit-large-patch14 from Hugging Face"


class AestheticHead(nn.Module):
    """Unit features [B, D] -> scores [B, 1]: D-1024-128-64-16-1. No activation between the layers: it is linear.

    The dropouts do nothing in eval mode; they keep the layers at the numbers that the published names have.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), nn.Dropout(0.2)),
            *(nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1)),
            *(nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class Aesthetic:
    """r = head(image features / |image features|), on the scale 1 to 10 of the ratings; most images lie in 4 to 7.

    The prompts are not read. The head runs in fp32 whatever `dtype` the tower has (in fp64 beside an fp64 tower).
    """

    name = "aesthetic"

    def __init__(
        self,
        path: str | Path | None = None,
        clip: str | Path | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """Load the head from the file `path` and the tower from the folder `clip`; raises ValueError for a misfit."""
        self.check(path, clip, dtype)
        folder, kind = check_model(self.name, "clip", clip, CLIP), tower_dtype(self.name, dtype)
        file = check_file(self.name, "path", path, WHAT)
        model = load_clip(self.name, folder, device, kind)
        self.head = AestheticHead(model.config.projection_dim)
        fill(self.head, read_checkpoint(self.name, file, WHAT), self.name, file, WHAT)
        self.tower = image_embedder(self.name, model, device, kind, middle="even")
        self.head.to(device, self.tower.wide).eval().requires_grad_(False)

    @staticmethod
    def check(path: str | Path | None, clip: str | Path | None, dtype: str) -> None:
        """Raise ValueError for what `Aesthetic(...)` would refuse: misfits, and values that are not finite."""
        file = check_file("aesthetic", "path", path, WHAT)
        tower: Any = CLIPConfig.from_pretrained(check_clip_model("aesthetic", "clip", clip, CLIP))
        fill(AestheticHead(tower.projection_dim), read_checkpoint("aesthetic", file, WHAT), "aesthetic", file, WHAT)
        tower_dtype("aesthetic", dtype)

    @staticmethod
    def skeleton(clip: str | Path | None, dtype: str) -> Skeleton:
        """The CLIP model by config.json, or as published; the head is small beside it."""
        return clip_skeleton(clip, VIT_L_14, dtype)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in 0..1 (any H, W); differentiable in the images."""
        check_pairs(self.name, images, prompts)
        return self.head(self.tower.images(images)).squeeze(-1)
