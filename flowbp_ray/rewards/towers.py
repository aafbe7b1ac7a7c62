"""The image and text towers of the shapes rewards: a transformers CLIP, and a convolutional one that is not.

Both offer encode_images([B, 3, 64, 64] in 0..1) -> [B, D] and encode_texts(ids [B, T]) -> [B, D], not normalised.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

POSITION_SCALE = 0.4  # of the sin-cos table; the usual initialisation of 0.02 is swamped by the patches


class Towers(nn.Module):
    """An image tower and a text tower that meet in one space."""

    def patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The image tower's last map [B, N, W] and the embedding [B, D] of images [B, 3, 64, 64] in 0..1."""
        raise TypeError(f"{type(self).__name__} has no image tower")

    def encode_images(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, 64, 64] in 0..1 as [B, D]."""
        return self.patches(images)[1]

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Embed token ids [B, T] as [B, D]."""
        raise TypeError(f"{type(self).__name__} has no text tower")


def build_towers(architecture: str, options: dict[str, Any]) -> Towers:
    """Build untrained towers by name: "clip" (CLIPTowers) or "conv" (ConvTowers)."""
    known: dict[str, type[Towers]] = {"clip": CLIPTowers, "conv": ConvTowers}
    if architecture not in known:
        raise ValueError(f"unknown reward architecture {architecture!r}; use one of {sorted(known)}")
    return known[architecture](**options)


def sincos_positions(side: int, width: int) -> Tensor:
    """Two-dimensional sin-cos table [side * side, width] in -1..1: half the width for rows, half for columns."""
    quarter = width // 4
    frequencies = 1.0 / 10.0 ** (torch.arange(quarter) / quarter)  # wavelengths from 6 to 60 patches
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    return torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)


class CLIPTowers(Towers):
    """transformers' CLIPModel at 64 pixels: a ViT over patches and a causal text transformer read at the end token."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any], projection: int) -> None:
        super().__init__()
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)
        self.clip = CLIPModel(config)
        table = sincos_positions(vision["image_size"] // vision["patch_size"], vision["hidden_size"])
        with torch.no_grad():
            self.clip.vision_model.embeddings.position_embedding.weight[1:] = POSITION_SCALE * table

    def patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden state of every patch [B, N, W] and the image's embedding [B, D]."""
        out = self.clip.vision_model(pixel_values=images * 2.0 - 1.0)
        return out.last_hidden_state[:, 1:], self.clip.visual_projection(out.pooler_output)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Embed token ids [B, T] as [B, D]."""
        return self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)


class Residual(nn.Module):
    """x + conv(gelu(norm(conv(gelu(norm(x)))))), group norms of eight channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(width // 8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(width // 8, width), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, W, h, w] -> the same shape."""
        hidden = self.conv1(F.gelu(self.norm1(x)))
        return x + self.conv2(F.gelu(self.norm2(hidden)))


class ConvTowers(Towers):
    """A residual convolutional image tower with coordinate channels and a mean-pooled bidirectional text tower."""

    grid: Tensor  # [2, 64, 64] in -1..1: row and column of each pixel

    def __init__(
        self, widths: list[int], text_width: int, text_layers: int, vocab_size: int, length: int, projection: int
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(5, widths[0], 4, stride=2, padding=1), Residual(widths[0])]
        for before, after in pairwise(widths):
            stages += [nn.Conv2d(before, after, 2, stride=2), Residual(after)]
        self.stages = nn.Sequential(*stages)
        side = 64 // 2 ** len(widths)
        self.squeeze = nn.Conv2d(widths[-1], 32, 1)
        self.head = nn.Sequential(
            nn.LayerNorm(32 * side * side),
            nn.Linear(32 * side * side, 2 * projection),
            nn.GELU(),
            nn.Linear(2 * projection, projection),
        )
        line = torch.linspace(-1.0, 1.0, 64)
        self.register_buffer("grid", torch.stack(torch.meshgrid(line, line, indexing="ij")), persistent=False)
        self.word = nn.Embedding(vocab_size, text_width, padding_idx=0)
        self.place = nn.Parameter(torch.randn(length, text_width) * 0.3)
        layer = nn.TransformerEncoderLayer(
            text_width, 4, 3 * text_width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, text_layers, enable_nested_tensor=False)
        self.read = nn.Linear(text_width, projection)
        nn.init.normal_(self.word.weight, std=0.5)

    def patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Last feature map as [B, N, W] and the image's embedding [B, D]."""
        x = torch.cat([images * 2.0 - 1.0, self.grid.to(images).expand(len(images), -1, -1, -1)], dim=1)
        x = self.stages(x)
        return x.flatten(2).transpose(1, 2), self.head(self.squeeze(x).flatten(1))

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Embed token ids [B, T] as [B, D]: the mean over the words."""
        real = (ids != 0)[..., None].to(self.place.dtype)
        hidden = self.encoder(self.word(ids) + self.place, src_key_padding_mask=ids == 0)
        return self.read((hidden * real).sum(1) / real.sum(1))
