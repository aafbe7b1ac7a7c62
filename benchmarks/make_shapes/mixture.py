"""Stage `mixture`: go on training the base on scenes that are drawn well and badly, in the latents of stage `looks`.

More of the scenes have two things in a relation, and more of the noise levels are high, where layout is decided: at
sigma 0.8 a thing's latents together are already easier to see than not, so the words must act above it.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL

from flowbp_ray.shapes.text import load_models

from .architecture import build_tokenizer
from .base import SEED, Base, Plan, train
from .latents import MIXED, load_latents

MIXTURE = Plan("mixture", (4000,), 1.2e-3, (0.8, 1.2), key=(SEED, 2))


def main(args: argparse.Namespace) -> None:
    """Train from stage `base` (or the embedded base) and write the model folder."""
    models = load_models(dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(args.work / "vae_looks").eval().requires_grad_(False)
    model = Base(models.text_encoder, models.transformer).train().requires_grad_(True)
    tokenizer = build_tokenizer()
    train(args, MIXTURE, model, tokenizer, vae, load_latents(args.work, vae, tokenizer, MIXED))
