"""Stage `looks`: go on training the autoencoder, encoder and decoder, on scenes that are drawn well and badly.

Latents change, so the base goes on after this (stage `mixture`). It starts from the stages before, or, where their
folders are absent from --work, from the embedded weights.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from diffusers import AutoencoderKL

from flowbp_ray.shapes import model_dir

from .decoder import save_half
from .facts import record
from .vae import KL_WEIGHT, draw, evaluate, loss_of, standardise

SEED = 23
BATCH = 16
STEPS = 1600
RATE = 1.5e-3
WARMUP = 40
GRAIN = 0.04  # standard deviation of the noise on standardised latents: a generated latent is never exact


def main(args: argparse.Namespace) -> None:
    """Train and save to vae/ of the model folder."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    steps, tuned = args.steps or STEPS, args.work / "vae_tuned"
    vae = AutoencoderKL.from_pretrained(tuned if tuned.exists() else model_dir() / "vae", torch_dtype=torch.float32)
    vae = vae.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-3)
    start, grain = time.process_time(), GRAIN / vae.config.scaling_factor
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        images = draw(rng, BATCH, looks=True).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        loss = loss_of(vae.decode(latents + grain * torch.randn_like(latents)).sample, images)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        (loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            spent = time.process_time() - start
            print(f"step {step} loss {loss.item():.4f} kl {kl.item():.2f} cpu {spent:.0f} s", flush=True)
        if step % 400 == 399:
            psnr, passed = evaluate(vae, n=200, looks=True)
            print(f"step {step + 1} PSNR {psnr:.2f} dB, verifier on reconstructions {passed:.4f}", flush=True)
            vae.save_pretrained(args.work / "vae_looks")
    vae.eval()
    standardise(vae, looks=True)
    clean, mixed = evaluate(vae), evaluate(vae, looks=True)
    print(f"PSNR {clean[0]:.2f}, {mixed[0]:.2f} dB, verifier {clean[1]:.4f}, {mixed[1]:.4f} (clean, all)", flush=True)
    vae.save_pretrained(args.work / "vae_looks")
    cpu = time.process_time() - start
    facts = dict(zip(("psnr", "passed", "psnr_looks", "passed_looks"), (*clean, *mixed), strict=True))
    record(args.work, "looks", seed=SEED, steps=steps, batch=BATCH, cpu=cpu, **facts)
    save_half(vae)
