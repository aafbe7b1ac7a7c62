"""What the CLIP-like rewards share: unit features of images, and of texts, which are read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
REMEMBERED = 4096


def tower_dtype(reward: str, dtype: str) -> torch.dtype:
    """The torch dtype that options.dtype names; raises ValueError for one that the towers do not run in."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"reward {reward!r}: options.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


@dataclass
class TextMemory:
    """Features [D] of texts, kept for the `limit` texts used last.

    Each is computed on its own, so that its bits do not depend on which prompts happened to come together.
    """

    read: Callable[[str], Tensor]
    limit: int = REMEMBERED
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features [B, D] of B texts, without gradient."""
        found: dict[str, Tensor] = {}
        # A tensor made in inference mode could not be used in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            for text in dict.fromkeys(texts):
                known = self.kept.pop(text, None)
                found[text] = self.read(text) if known is None else known
        self.kept.update(found)  # a dict keeps the order of insertion: the oldest come first
        for text in list(self.kept)[: -self.limit]:
            del self.kept[text]
        return torch.stack([found[text] for text in texts])


class ImageEmbedder:
    """Unit features of images.

    pixels: images [B, 3, H, W] in 0..1 -> what the tower reads, in fp32 or wider. see: that, in `dtype`, -> features
    [B, D]. They are normalised in fp32 (fp64 where the tower runs in fp64).
    """

    def __init__(
        self,
        name: str,
        device: str,
        dtype: torch.dtype,
        pixels: Callable[[Tensor], Tensor],
        see: Callable[[Tensor], Tensor],
    ) -> None:
        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.pixels, self.see = pixels, see

    def images(self, images: Tensor) -> Tensor:
        """Unit features [B, D] of images [B, 3, H, W] in 0..1; differentiable."""
        pixels = self.pixels(images.to(self.device)).to(self.dtype)
        return F.normalize(self.see(pixels).to(self.wide), dim=-1)


class Embedder(ImageEmbedder):
    """Unit features of images and of texts, and their cosine. read: one text -> its features [D]."""

    def __init__(
        self,
        name: str,
        device: str,
        dtype: torch.dtype,
        pixels: Callable[[Tensor], Tensor],
        see: Callable[[Tensor], Tensor],
        read: Callable[[str], Tensor],
    ) -> None:
        super().__init__(name, device, dtype, pixels, see)
        self.texts = TextMemory(lambda text: F.normalize(read(text).to(self.wide), dim=-1))

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [B] of each image with its prompt; differentiable in the images."""
        check_pairs(self.name, images, prompts)
        return (self.images(images) * self.texts(prompts)).sum(-1)


def check_pairs(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError where images and prompts are not as many, or none."""
    if len(images) != len(prompts) or not len(prompts):
        raise ValueError(f"reward {name!r} needs one prompt per image, got {len(images)} and {len(prompts)}")
