"""PickScore, which of two images people pick for a prompt: a tuned CLIP ViT-H/14 with its temperature.

Pick-a-Pic (Kirstain et al., arXiv 2305.01569) and the card of yuvalkirstain/PickScore_v1 on Hugging Face.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flowbp_ray.rewards.clip_folder import (
    TOKENIZER,
    check_clip_model,
    check_model,
    check_tokenizer,
    embedder,
    load_clip,
)
from flowbp_ray.rewards.embedding import tower_dtype
from flowbp_ray.rewards.skeleton import VIT_H_14, Skeleton, clip_skeleton

WHAT = "the folder of yuvalkirstain/PickScore_v1 from Hugging Face"
WORDS = "the folder of a CLIP tokenizer, such as that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K from Hugging Face"


class PickScore:
    """r = scale · exp(t) · cos(image features, text features), t the model's logit_scale (arXiv 2305.01569, eq. 1).

    scale 1 gives the published value, about 20 to 24. As a loss term that is a large number beside cosines: trainers
    often write 1/26 = 0.0385. tokenizer: its folder, where `path` has none of its own.
    """

    name = "pickscore"

    def __init__(
        self,
        path: str | Path | None = None,
        tokenizer: str | Path | None = None,
        scale: float = 1.0,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """Load a CLIPModel of transformers from the folder `path`; raises ValueError where it is not one."""
        self.check(path, tokenizer, scale, dtype)
        folder, kind = check_model(self.name, "path", path, WHAT), tower_dtype(self.name, dtype)
        model = load_clip(self.name, folder, device, kind)
        words = folder if tokenizer is None else check_tokenizer(self.name, "tokenizer", tokenizer, WORDS)
        self.towers = embedder(self.name, model, words, device, kind)
        self.factor = scale * model.logit_scale.exp()

    @staticmethod
    def check(path: str | Path | None, tokenizer: str | Path | None, scale: float, dtype: str) -> None:
        """Raise ValueError for what `PickScore(...)` would refuse: misfits, and values that are not finite."""
        folder = check_clip_model("pickscore", "path", path, WHAT)
        if tokenizer is not None:
            check_tokenizer("pickscore", "tokenizer", tokenizer, WORDS)
        elif any((folder / name).is_file() for name in TOKENIZER):
            check_tokenizer("pickscore", "path", folder, WHAT)
        else:
            raise ValueError(f"reward 'pickscore': {folder} has no tokenizer; write options.tokenizer: {WORDS}")
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(f"reward 'pickscore': options.scale must be a number above 0, got {scale!r}")
        tower_dtype("pickscore", dtype)

    @staticmethod
    def skeleton(path: str | Path | None, dtype: str) -> Skeleton:
        """Its model by config.json, or as published."""
        return clip_skeleton(path, VIT_H_14, dtype)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in 0..1 (any H, W) for B prompts; differentiable in the images."""
        return self.factor * self.towers.cosine(images, prompts)
