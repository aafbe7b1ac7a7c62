"""BLIP's image-grounded text encoder, with the published names: a ViT, and a BERT that looks at its tokens.

Li et al., "BLIP" (arXiv 2201.12086), figure 2. Modules and parameters are called what they are called in the published
checkpoints, so that these load without a mapping. Layer norms: eps 1e-6 in the ViT, 1e-12 in the text encoder; heads
are 64 wide in both; activations are exact GELU; there is no dropout, since nothing here is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64


@dataclass(frozen=True)
class BlipSizes:
    """What the shapes of a checkpoint say. BLIP-L: 1024, 4096, 24, 16, 224; 768, 3072, 12, 30524, 512."""

    vision_width: int
    vision_hidden: int
    vision_layers: int
    patch: int
    image: int
    text_width: int
    text_hidden: int
    text_layers: int
    vocabulary: int
    positions: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> BlipSizes:
        """Read them from name -> shape; KeyError where the names are not those of BLIP."""
        vision, text = f"{prefix}visual_encoder.", f"{prefix}text_encoder."
        patch = shapes[f"{vision}patch_embed.proj.weight"][-1]
        vocabulary, text_width = shapes[f"{text}embeddings.word_embeddings.weight"]
        return cls(
            vision_width=shapes[f"{vision}cls_token"][-1],
            vision_hidden=shapes[f"{vision}blocks.0.mlp.fc1.weight"][0],
            vision_layers=_layers(shapes, f"{vision}blocks."),
            patch=patch,
            image=math.isqrt(shapes[f"{vision}pos_embed"][1] - 1) * patch,
            text_width=text_width,
            text_hidden=shapes[f"{text}encoder.layer.0.intermediate.dense.weight"][0],
            text_layers=_layers(shapes, f"{text}encoder.layer."),
            vocabulary=vocabulary,
            positions=shapes[f"{text}embeddings.position_embeddings.weight"][0],
        )


def _layers(names: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """One more than the highest index after `prefix`, so that a layer in the middle that is missing is noticed."""
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in names if name.startswith(prefix))


class Blip(nn.Module):
    """Text hidden states that have looked at the image: (pixels, ids, mask) -> [B, L, text width]."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        self.visual_encoder = VisionEncoder(sizes)
        self.text_encoder = TextEncoder(sizes)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels [B, 3, S, S] normalised; ids [B, L]; mask [B, L] bool, False at padding."""
        states: Tensor = self.text_encoder(ids, mask, self.visual_encoder(pixels))
        return states


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √64) v with heads 64 wide; [B, L, D], [B, K, D], [B, K, D] -> [B, L, D].

    mask: [B, K] bool, False for what nobody may look at.
    """
    q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (query, key, value))
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return seen.transpose(1, 2).flatten(2)


class VisionEncoder(nn.Module):
    """A pre-norm ViT with a class token: [B, 3, S, S] -> [B, 1 + (S / patch)², D]."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        width = sizes.vision_width
        self.cls_token = _empty(1, 1, width)
        self.pos_embed = _empty(1, 1 + (sizes.image // sizes.patch) ** 2, width)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, sizes.patch, stride=sizes.patch)})
        self.blocks = nn.ModuleList(VisionBlock(width, sizes.vision_hidden) for _ in range(sizes.vision_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.norm(x)
        return states


class VisionBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](attend(q, k, v))
        out: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return out


class TextEncoder(nn.Module):
    """A post-norm BERT without token types and pooler, with cross-attention in every layer."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(sizes.vocabulary, width),
                "position_embeddings": nn.Embedding(sizes.positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = TextLayers(sizes)

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](places)
        states: Tensor = self.encoder(self.embeddings["LayerNorm"](x), mask, image)
        return states


class TextLayers(nn.Module):
    """The layers one after the other; a module of its own for the sake of its name, `layer`."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        widths = sizes.text_width, sizes.vision_width, sizes.text_hidden
        self.layer = nn.ModuleList(TextLayer(*widths) for _ in range(sizes.text_layers))

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask, image)
        return x


class TextLayer(nn.Module):
    """Self-attention over the words, cross-attention to the image, feed-forward; each with norm(x + f(x))."""

    def __init__(self, width: int, image_width: int, hidden: int) -> None:
        super().__init__()
        self.attention = TextAttention(width, width)
        self.crossattention = TextAttention(width, image_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _Output(hidden, width)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image, None)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class TextAttention(nn.Module):
    """norm(x + dense(attention of x to `context`))."""

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_width, width),
                "value": nn.Linear(context_width, width),
            }
        )
        self.output = _Output(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        seen = attend(self.self["query"](x), self.self["key"](context), self.self["value"](context), mask)
        out: Tensor = self.output(seen, x)
        return out


class _Output(nn.Module):
    """LayerNorm(dense(x) + residual)."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


def _empty(*shape: int) -> nn.Parameter:
    """A parameter whose values come from the checkpoint."""
    return nn.Parameter(torch.empty(*shape))
