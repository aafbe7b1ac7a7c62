"""Plain Euler sampling and the verifier's score of what comes out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

from flowbp_ray.backbones.base import uint8_images, unit_images
from flowbp_ray.shapes import Prompt, colour_entropy, quality, verify


@dataclass(frozen=True)
class Score:
    """Verifier pass rates (overall and per skill), the quality meter's mean and the colour entropy in bits."""

    passed: float
    skills: dict[str, float]
    quality: float
    entropy: float


def sigma_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 noise levels from 1 to 0, statically shifted."""
    uniform = np.linspace(1.0, 0.0, steps + 1)
    return [float(s) for s in shift * uniform / (1 + (shift - 1) * uniform)]


@torch.no_grad()
def sample_latents(
    transformer: SD3Transformer2DModel,
    text: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    noise: Tensor,
    sigmas: list[float],
    guidance: float,
) -> Tensor:
    """Euler from noise [B, 8, 8, 8]; `negative` is one row and is used only if guidance is not 1."""
    x, n = noise, len(noise)
    embeds, pooled = text
    if guidance != 1:
        embeds = torch.cat([negative[0].expand(n, -1, -1), embeds])
        pooled = torch.cat([negative[1].expand(n, -1), pooled])
    for high, low in pairwise(sigmas):
        states = torch.cat([x, x]) if guidance != 1 else x
        time = torch.full((len(states),), high * 1000)
        v = transformer(
            hidden_states=states, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=time
        ).sample
        if guidance != 1:
            uncond, cond = v.chunk(2)
            v = uncond + guidance * (cond - uncond)
        x = x + (low - high) * v
    return x


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Standardised latents [B, 8, 8, 8] -> uint8 [B, 64, 64, 3]."""
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    return np.concatenate([uint8_images(unit_images(vae.decode(z).sample)) for z in raw.split(50)])


def score(images: np.ndarray, prompts: list[Prompt]) -> Score:
    """Verify every picture against its prompt, and read how well it is drawn."""
    skills: dict[str, list[bool]] = defaultdict(list)
    for image, prompt in zip(images, prompts, strict=True):
        skills[prompt.skill].append(verify(image, prompt))
    flat = [passed for each in skills.values() for passed in each]
    means = {skill: float(np.mean(each)) for skill, each in skills.items()}
    drawn = float(np.mean([quality(image).mean for image in images]))
    return Score(float(np.mean(flat)), means, drawn, colour_entropy(images, prompts))
