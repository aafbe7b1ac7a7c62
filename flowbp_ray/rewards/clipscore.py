"""CLIPScore, how well an image fits its prompt: cos(image, text) of OpenAI's CLIP ViT-L/14 (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flowbp_ray.rewards.clip_folder import check_clip_model, check_model, check_tokenizer, embedder, load_clip
from flowbp_ray.rewards.embedding import tower_dtype
from flowbp_ray.rewards.skeleton import VIT_L_14, Skeleton, clip_skeleton

WHAT = "the folder of openai/clip-vit-large-patch14 from Hugging Face"


class CLIPScore:
    """r = cos(image features, text features); about 0.15 to 0.35.

    CLIPScore as first published (Hessel et al., arXiv 2104.08718, eq. 1) is 2.5 · max(r, 0) with ViT-B/32; others write
    100 r. A term's `scale` does that, and the cut at 0 would take the gradient from the worst images.
    """

    name = "clipscore"

    def __init__(self, path: str | Path | None = None, device: str = "cpu", dtype: str = "float32") -> None:
        """Load a CLIPModel of transformers from the folder `path`; raises ValueError where it is not one."""
        self.check(path, dtype)
        folder, kind = check_model(self.name, "path", path, WHAT), tower_dtype(self.name, dtype)
        self.towers = embedder(self.name, load_clip(self.name, folder, device, kind), folder, device, kind)

    @staticmethod
    def check(path: str | Path | None, dtype: str) -> None:
        """Raise ValueError for what `CLIPScore(...)` would refuse: misfits, and values that are not finite."""
        check_clip_model("clipscore", "path", path, WHAT)
        check_tokenizer("clipscore", "path", path, WHAT)
        tower_dtype("clipscore", dtype)

    @staticmethod
    def skeleton(path: str | Path | None, dtype: str) -> Skeleton:
        """Its model by config.json, or as published."""
        return clip_skeleton(path, VIT_L_14, dtype)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [B] of images [B, 3, H, W] in 0..1 (any H, W) with B prompts; differentiable in the images."""
        return self.towers.cosine(images, prompts)
