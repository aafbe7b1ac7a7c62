"""The text encoder of captions (a word-level tokenizer and a two-layer CLIP text model), and loaders for the models.

The transformer is conditioned on `last_hidden_state` (not on the penultimate layer, as large SD3 models are) and on the
projected `text_embeds`. The empty caption is the negative prompt of guidance; training used it one time in ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .captions import MAX_WORDS
from .prompts import model_dir

if TYPE_CHECKING:  # importing a pipeline takes seconds, and transformers warns of what it lacks for pictures as input
    from diffusers import StableDiffusion3Pipeline

TOKENS = MAX_WORDS + 2  # the words, a start and an end


@dataclass(frozen=True)
class ShapesModels:
    """The embedded models, in eval mode and without gradients."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: CLIPTextModelWithProjection
    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler


def tokenize(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids, int64 [B, 14]. Raises ValueError for a word outside the grammar or a caption that is too long."""
    batch = tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt")
    ids: Tensor = batch["input_ids"]
    if ids.shape[1] > TOKENS:
        raise ValueError(f"write at most {MAX_WORDS} words in a shapes caption, got {max(prompts, key=len)!r:.80}")
    unknown = (ids == tokenizer.unk_token_id).any(1)
    if unknown.any():
        first = prompts[int(unknown.nonzero()[0])]
        raise ValueError(
            f"{first!r:.100} has a word that the shapes grammar lacks; write the words of "
            "flowbp_ray.shapes.captions.WORDS only"
        )
    return ids


def embed(ids: Tensor, text_encoder: CLIPTextModelWithProjection) -> tuple[Tensor, Tensor]:
    """Token ids [B, 14] -> embeddings [B, 14, 128] and pooled embeddings [B, 128]."""
    output = text_encoder(input_ids=ids)
    return output.last_hidden_state, output.text_embeds


def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModelWithProjection
) -> tuple[Tensor, Tensor]:
    """Captions -> embeddings [B, 14, 128] and pooled embeddings [B, 128], without gradients."""
    with torch.no_grad():
        return embed(tokenize(prompts, tokenizer).to(text_encoder.device), text_encoder)


def load_text(
    folder: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedTokenizerBase, CLIPTextModelWithProjection]:
    """Load the tokenizer and the text encoder of a model folder (default: the committed one)."""
    folder = folder or model_dir()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=dtype)
    return tokenizer, encoder.eval().requires_grad_(False)


def load_models(folder: Path | None = None, dtype: torch.dtype = torch.float32) -> ShapesModels:
    """Load all models of a model folder (default: the committed one). The stored weights are fp16."""
    folder = folder or model_dir()
    tokenizer, text_encoder = load_text(folder, dtype)
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return ShapesModels(
        tokenizer,
        text_encoder,
        transformer.eval().requires_grad_(False),
        vae.eval().requires_grad_(False),
        scheduler,
    )


def load_pipeline(folder: Path | None = None, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """Load the diffusers pipeline of a model folder, without text encoders: call it with `prompt_embeds=`."""
    from diffusers import StableDiffusion3Pipeline

    absent = dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    return StableDiffusion3Pipeline.from_pretrained(folder or model_dir(), torch_dtype=dtype, **absent)
