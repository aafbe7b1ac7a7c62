"""The exact verifier of the embedded domain as a reward without gradient: 1 for a picture that shows its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from flowbp_ray.backbones.base import uint8_images
from flowbp_ray.shapes import Prompt, verify
from flowbp_ray.shapes.prompts import SPLITS, load_prompts


class ShapesVerifier:
    """Score 1.0 or 0.0 per image [3, 64, 64]; see `flowbp_ray.shapes.verifier`."""

    differentiable = False

    def __init__(self, device: str = "cpu") -> None:
        """device: where the scores are returned; a picture is read on the host."""
        self.name, self.device = "shapes_verifier", device

    @staticmethod
    def check_prompts(texts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that is none of the domain's: what it claims is not known."""
        for text in texts:
            if text not in _claims():
                raise ValueError(
                    f"reward 'shapes_verifier' knows the prompts of the embedded domain only, not {text!r:.100}; write "
                    "data.prompts=shapes:train"
                )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] fp32 of images [B, 3, 64, 64] in 0..1."""
        claims = _claims()
        found = [verify(i, claims[text]) for i, text in zip(uint8_images(images.detach()), prompts, strict=True)]
        return torch.tensor(found, dtype=torch.float32, device=self.device)


@cache
def _claims() -> dict[str, Prompt]:
    """The prompts of all splits by their text."""
    return {prompt.text: prompt for split in SPLITS for prompt in load_prompts(split)}
