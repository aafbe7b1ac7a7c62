"""Stage `decoder`: go on training the decoder alone, with the encoder frozen.

The latents stay what they are, so the base model can be trained on them at the same time.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from diffusers import AutoencoderKL

from flowbp_ray.shapes import model_dir

from .architecture import forget_source
from .facts import record
from .vae import draw, evaluate, loss_of

SEED = 22
BATCH = 16
STEPS = 1000
RATE = 2e-3
WARMUP = 50
GRAIN = 0.05  # standard deviation of the noise on standardised latents: a generated latent is never exact


def main(args: argparse.Namespace) -> None:
    """Train and save to vae/ of the model folder; the encoder's weights are not touched."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    steps = args.steps or STEPS
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=RATE, weight_decay=1e-3)
    start = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        images = draw(rng, BATCH).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
            latents = latents + GRAIN / vae.config.scaling_factor * torch.randn_like(latents)
        loss = loss_of(vae.decode(latents).sample, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            spent = time.process_time() - start
            print(f"step {step} loss {loss.item():.4f} cpu {spent:.0f} s", flush=True)
        if step % 400 == 399:
            psnr, passed = evaluate(vae, n=200)
            print(f"step {step + 1} PSNR {psnr:.2f} dB, verifier on reconstructions {passed:.4f}", flush=True)
            vae.save_pretrained(args.work / "vae_tuned")
    vae.eval()
    psnr, passed = evaluate(vae)
    print(f"PSNR {psnr:.2f} dB, verifier on reconstructions {passed:.4f}", flush=True)
    vae.save_pretrained(args.work / "vae_tuned")
    cpu = time.process_time() - start
    record(args.work, "decoder", seed=SEED, steps=steps, batch=BATCH, cpu=cpu, psnr=psnr, passed=passed)
    save_half(vae)


def save_half(vae: AutoencoderKL) -> None:
    """Write the autoencoder as fp16 into the model folder, without the name of the folder that it was loaded from."""
    vae.half().save_pretrained(model_dir() / "vae")
    forget_source(model_dir() / "vae" / "config.json")
