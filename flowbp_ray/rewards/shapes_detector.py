"""The second differentiable reward of the embedded domain: what a small detector sees, held against the prompt's claim.

    score = (agreement(maps of the picture, claim of the prompt) - low) / (high - low)

`agreement` is in `flowbp_ray.rewards.shapes_claims`. `low` and `high` are its means over wrong and over true claims
of pictures that the detector never saw, so 0 reads "no better than a wrong caption" and 1 "as a true rendering". The
map is affine: it bends no gradient. Content is judged, whatever the look; how well a picture is drawn is not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbp_ray.rewards.base import needed
from flowbp_ray.rewards.embedding import tower_dtype
from flowbp_ray.rewards.files import read_parts
from flowbp_ray.rewards.shapes_claims import agreement
from flowbp_ray.rewards.shapes_clip import WEIGHTS, WHAT
from flowbp_ray.rewards.shapes_maps import Detector
from flowbp_ray.rewards.skeleton import Skeleton, dtype_of
from flowbp_ray.shapes.captions import claim_of
from flowbp_ray.shapes.world import CANVAS


class ShapesDetector:
    """Affine-calibrated agreement of a picture [3, 64, 64] with what its prompt claims (module docstring)."""

    name = "shapes_detector"

    def __init__(self, folder: str | Path | None = None, device: str = "cpu", dtype: str = "float32") -> None:
        """Load `config.json` and `model.safetensors` from `folder` (default: the weights in the package)."""
        self.model, self.low, self.high = _opened(folder)
        self.device, self.dtype = torch.device(device), tower_dtype(self.name, dtype)
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)

    @staticmethod
    def check(folder: str | Path | None, dtype: str) -> None:
        """Raise ValueError where there is no such model, or no such dtype."""
        _opened(folder)
        tower_dtype("shapes_detector", dtype)

    @staticmethod
    def check_prompts(texts: Sequence[str]) -> None:
        """Raise ValueError for a prompt outside the grammar: what it claims is not known."""
        for text in texts:
            claim_of(text)

    @staticmethod
    def skeleton(folder: str | Path | None, dtype: str) -> Skeleton:
        """By its config.json."""
        config: dict[str, Any] = json.loads((_folder(folder) / "config.json").read_text())
        with torch.device("meta"):
            model = Detector(**config["model"]).eval().requires_grad_(False)
        return Skeleton(model, dtype_of(dtype), CANVAS, lambda model, pixels: model(pixels).kinds)

    def agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] before the calibration, at most 0, fp32 or wider; images [B, 3, 64, 64] in 0..1."""
        if images.shape[1:] != (3, CANVAS, CANVAS):
            raise ValueError(f"shapes_detector reads images [B, 3, 64, 64], got {list(images.shape)}")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need {len(images)} prompts, got {len(prompts)}")
        claims = [claim_of(text) for text in prompts]
        maps = self.model(images.to(self.device, self.dtype))
        return torch.cat([agreement(maps.row(i), claim) for i, claim in enumerate(claims)])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Calibrated score [B]: 0 for the mean wrong caption, 1 for the mean true one."""
        return (self.agreement(images, prompts) - self.low) / (self.high - self.low)


def _folder(folder: str | Path | None) -> Path:
    """The given folder, or that in the package; raises ValueError for one that does not exist."""
    return WEIGHTS / "shapes_detector" if folder is None else needed("shapes_detector", "folder", folder, WHAT)


def _opened(folder: str | Path | None) -> tuple[Detector, float, float]:
    """The detector, and the two ends of the scale."""

    def parts(config: dict[str, Any]) -> tuple[Detector, float, float]:
        ends = config["calibration"]
        return Detector(**config["model"]), float(ends["low"]), float(ends["high"])

    return read_parts("shapes_detector", _folder(folder), parts, WHAT)
