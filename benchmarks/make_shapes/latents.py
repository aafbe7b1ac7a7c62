"""Encode the training scenes once: standardised latents and a few captions for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowbp_ray.shapes import SKILLS, Prompt, render, sample
from flowbp_ray.shapes.captions import caption
from flowbp_ray.shapes.look import CLEAN, sample_look
from flowbp_ray.shapes.sampling import in_split
from flowbp_ray.shapes.text import tokenize
from flowbp_ray.shapes.world import SKILL_WEIGHTS

from .vae import to_pixels

SEED = 41
SCENES = 36000
CAPTIONS = 4  # paraphrases kept for each scene
CHUNK = 500


def _paraphrases(rng: np.random.Generator, prompt: Prompt) -> list[str]:
    """CAPTIONS sentences of the training split that make the prompt's claim."""
    texts = [prompt.text]
    while len(texts) < CAPTIONS:
        text = caption(rng, prompt.claim)
        if in_split(Prompt(text, prompt.skill, prompt.claim), "train"):
            texts.append(text)
    return texts


@dataclass(frozen=True)
class Scenes:
    """Training scenes: their file in --work, how often each skill is drawn, and whether they are drawn badly too."""

    file: str
    key: tuple[int, ...]
    skills: tuple[float, ...]
    looks: bool


CLEANLY = Scenes("latents.pt", (SEED,), SKILL_WEIGHTS, looks=False)
MIXED = Scenes("latents_looks.pt", (SEED, 1), (0.06, 0.08, 0.16, 0.16, 0.34, 0.20), looks=True)


@torch.no_grad()
def _chunk(scenes: Scenes, index: int, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Scenes index * CHUNK onwards: latents [CHUNK, 8, 8, 8] and token ids [CHUNK, CAPTIONS, 14]."""
    rng = np.random.default_rng((*scenes.key, index))
    pairs = [sample(rng, "train", str(rng.choice(SKILLS, p=scenes.skills))) for _ in range(CHUNK)]
    texts = [text for _, prompt in pairs for text in _paraphrases(rng, prompt)]
    pictures = [render(scene, sample_look(rng) if scenes.looks else CLEAN) for scene, _ in pairs]
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in to_pixels(np.stack(pictures)).split(20)])
    ids = tokenize(texts, tokenizer).view(CHUNK, CAPTIONS, -1)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor, ids


def load_latents(
    work: Path, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase, scenes: Scenes = CLEANLY
) -> tuple[Tensor, Tensor]:
    """Latents float32 [SCENES, 8, 8, 8] and token ids int64 [SCENES, CAPTIONS, 14]; made once and kept in `work`."""
    file = work / scenes.file
    if not file.exists():
        chunks = []
        for index in range(SCENES // CHUNK):
            chunks.append(_chunk(scenes, index, vae, tokenizer))
            if index % 10 == 9:
                print(f"encoded {(index + 1) * CHUNK} scenes", flush=True)
        latents, ids = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        print(f"latents: mean {latents.mean():.3f}, std {latents.std():.3f}", flush=True)
        torch.save({"latents": latents, "ids": ids}, file)
    stored = torch.load(file, weights_only=True)
    return stored["latents"], stored["ids"]
