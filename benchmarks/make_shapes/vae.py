"""Stage `vae`: train the AutoencoderKL (0.95 M parameters, 64x64x3 -> 8x8x8) on rendered scenes."""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from flowbp_ray.backbones.base import uint8_images, unit_images
from flowbp_ray.shapes import model_dir, render, sample, verify
from flowbp_ray.shapes.look import CLEAN, sample_look

from .facts import record

SEED = 21
BATCH = 16
STEPS = 940
RATE = 2e-3
WARMUP = 40
KL_WEIGHT = 3e-5


def build() -> AutoencoderKL:
    """The decoder and encoder, at random initialisation."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(rng: np.random.Generator, n: int, looks: bool = False) -> Tensor:
    """n rendered training scenes: float32 [n, 3, 64, 64] in [-1, 1]; with `looks` drawn well and badly."""
    pictures = [render(sample(rng, "train")[0], sample_look(rng) if looks else CLEAN) for _ in range(n)]
    return to_pixels(np.stack(pictures))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + L1 of the horizontal and vertical differences; the last keeps edges sharp."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero; a factor of RATE."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def evaluate(vae: AutoencoderKL, seed: int = 99, n: int = 500, looks: bool = False) -> tuple[float, float]:
    """PSNR in dB and the verifier's pass rate on reconstructions of n fresh scenes (both splits)."""
    rng = np.random.default_rng(seed)
    pairs = [sample(rng, "train" if i % 2 else "heldout") for i in range(n)]
    images = to_pixels(np.stack([render(scene, sample_look(rng) if looks else CLEAN) for scene, _ in pairs]))
    output = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in images.split(50)])
    mse = ((output.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    passed = [
        verify(image, prompt) for image, (_, prompt) in zip(uint8_images(unit_images(output)), pairs, strict=True)
    ]
    return float((-10 * mse.log10()).mean()), float(np.mean(passed))


@torch.no_grad()
def standardise(vae: AutoencoderKL, seed: int = 98, n: int = 1000, looks: bool = False) -> None:
    """Set scaling_factor and shift_factor so that latents have mean 0 and variance 1 over the data."""
    rng = np.random.default_rng(seed)
    latents = torch.cat([vae.encode(draw(rng, 50, looks)).latent_dist.mode() for _ in range(n // 50)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))


def main(args: argparse.Namespace) -> None:
    """Train and save to vae/ of the model folder."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    steps = args.steps or STEPS
    vae = build()
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {steps} steps", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-3)
    start = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step, steps)
        images = draw(rng, BATCH)
        posterior = vae.encode(images).latent_dist
        loss = loss_of(vae.decode(posterior.sample()).sample, images)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        (loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            spent = time.process_time() - start
            print(f"step {step} loss {loss.item():.4f} kl {kl.item():.2f} cpu {spent:.0f} s", flush=True)
        if step % 200 == 199:
            vae.save_pretrained(args.work / "vae")
    vae.eval()
    standardise(vae)
    psnr, passed = evaluate(vae)
    print(f"PSNR {psnr:.2f} dB, verifier on reconstructions {passed:.4f}", flush=True)
    vae.save_pretrained(args.work / "vae")
    record(
        args.work, "vae", seed=SEED, steps=steps, batch=BATCH, cpu=time.process_time() - start, psnr=psnr, passed=passed
    )
    vae.half().save_pretrained(model_dir() / "vae")
