"""The rewards of the embedded domain: two small CLIP-like models of different build, one to train on, one held out.

    score = (cos(image, text) - low) / (high - low)

`low` and `high` are the mean cosines of wrong and of matching captions on scenes the model never saw, so 0 reads "no
better than a wrong caption" and 1 "as good as a true rendering". The map is affine: it bends no gradient. A clip of 1
in the loss means "as good as the real thing is good enough".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards.base import needed
from flowbp_ray.rewards.embedding import tower_dtype
from flowbp_ray.rewards.files import read_parts
from flowbp_ray.rewards.skeleton import Skeleton, dtype_of
from flowbp_ray.rewards.towers import build_towers

WEIGHTS = Path(__file__).resolve().parents[1] / "shapes" / "data" / "rewards"
WHAT = "a folder with config.json and model.safetensors, as `python -m benchmarks.make_shapes` makes them"
PAD, START, END = 0, 1, 3  # 2 is left free: transformers' CLIP treats an end token of 2 as a legacy model
SPECIAL = ["<pad>", "<start>", "<free>", "<end>"]


class Words:
    """Whole words to ids: lower case, punctuation dropped, <start> … <end>, padded to a fixed length."""

    def __init__(self, vocabulary: Sequence[str], length: int) -> None:
        self.ids = {word: i for i, word in enumerate([*SPECIAL, *vocabulary])}
        self.length = length

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, text: str) -> list[int]:
        """Ids of one text, `length` long."""
        words = re.findall(r"[a-z0-9]+", text.lower())
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise ValueError(
                f"the shapes rewards do not know {unknown} in {text!r:.99}; they read the shapes grammar only"
            )
        if len(words) > self.length - 2:
            raise ValueError(
                f"the shapes rewards read at most {self.length - 2} words, got {len(words)} in {text!r:.100}"
            )
        ids = [START, *(self.ids[word] for word in words), END]
        return ids + [PAD] * (self.length - len(ids))


class ShapesClip:
    """Affine-calibrated cosine of a small image tower and a small text tower (module docstring), on [B, 3, 64, 64]."""

    name = "shapes_clip"

    def __init__(self, folder: str | Path | None = None, device: str = "cpu", dtype: str = "float32") -> None:
        """Load `config.json` and `model.safetensors` from `folder` (default: the weights in the package)."""
        self.model, self.words, self.low, self.high = self._opened(folder)
        self.device, self.dtype = torch.device(device), tower_dtype(self.name, dtype)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def check(cls, folder: str | Path | None, dtype: str) -> None:
        """Raise ValueError where there is no such model, or no such dtype."""
        cls._opened(folder)
        tower_dtype(cls.name, dtype)

    @classmethod
    def _opened(cls, folder: str | Path | None) -> tuple[Any, Words, float, float]:
        found = WEIGHTS / cls.name if folder is None else needed(cls.name, "folder", folder, WHAT)
        return read_parts(cls.name, found, _parts, WHAT)

    @classmethod
    def skeleton(cls, folder: str | Path | None, dtype: str) -> Skeleton:
        """By its config.json."""
        found = WEIGHTS / cls.name if folder is None else needed(cls.name, "folder", folder, WHAT)
        config: dict[str, Any] = json.loads((found / "config.json").read_text())
        with torch.device("meta"):
            model = build_towers(config["architecture"], config["model"]).eval().requires_grad_(False)
        return Skeleton(model, dtype_of(dtype), 64, lambda model, pixels: model.encode_images(pixels))

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each image [B, 3, 64, 64] in 0..1 with its prompt; [B]. Differentiable in the images."""
        seen, wide = self.model.encode_images(images.to(self.device, self.dtype)), self.wide
        return F.cosine_similarity(seen.to(wide), self.embed(prompts).to(wide), dim=-1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Calibrated score [B]: 0 for the mean wrong caption, 1 for the mean true one."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need {len(images)} prompts, got {len(prompts)}")
        return (self.cosine(images, prompts) - self.low) / (self.high - self.low)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, D], not normalised, remembered per prompt.

        Each is computed on its own, so that its bits do not depend on which prompts happened to come together.
        """
        for text in set(prompts) - self._texts.keys():
            with torch.no_grad():
                ids = torch.tensor([self.words(text)], device=self.device)
                self._texts[text] = self.model.encode_texts(ids)[0]
        return torch.stack([self._texts[text] for text in prompts])


class ShapesClipHeldout(ShapesClip):
    """The second model: another architecture, seed and data order. Reported, never trained on."""

    name = "shapes_clip_heldout"


class ShapesPreference(ShapesClip):
    """The first model, trained further on choices between two pictures of a prompt: content and how well it is drawn.

    0: the mean of pictures that are wrong or badly drawn; 1: of those that are right and drawn well.
    """

    name = "shapes_preference"


class ShapesPreferenceHeldout(ShapesClip):
    """The held-out model, trained further in the same way. Reported, never trained on."""

    name = "shapes_preference_heldout"


def _parts(config: dict[str, Any]) -> tuple[Any, Words, float, float]:
    """The towers without their weights, the words, and the two ends of the scale."""
    words, ends = config["vocabulary"], config["calibration"]
    if not isinstance(words, list):
        raise TypeError("the vocabulary is no list")
    towers = build_towers(config["architecture"], config["model"])
    return towers, Words(words, int(config["text_length"])), float(ends["low"]), float(ends["high"])
