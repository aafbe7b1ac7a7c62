"""Stage `detector`: train the detector behind the reward `shapes_detector` and write it as package data.

Each batch is used twice, the second time moved along its gradient, so that no small change of the pixels makes
something of nothing. One seed, one thread; samples of the base come from the stage `preference`.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowbp_ray.rewards.shapes_maps import CELL, Detector, Maps

from .detector_data import Pictures, Targets, batch, pictures
from .detector_report import publish
from .facts import record

SEED = 91
BATCH = 48
STEPS = 1500
RATE = 2e-3
WARMUP = 40
ADVERSARY = 1.0  # largest L2 norm of the perturbation of a picture in 0..1
OPTIONS: dict[str, list[int]] = {"widths": [16, 48, 96], "depths": [0, 1, 3]}


def loss_of(maps: Maps, wanted: Targets) -> Tensor:
    """Cross-entropy of what lies in each cell, and of colour, size and place near things; a sum over a picture."""
    near = wanted.near
    kinds = F.nll_loss(maps.kinds.flatten(0, 1), wanted.kinds.flatten(), reduction="sum")
    colours = F.nll_loss(maps.colours[near], wanted.colours[near], reduction="sum")
    large = F.binary_cross_entropy_with_logits(maps.large[near], wanted.large[near], reduction="sum")
    places = F.smooth_l1_loss(maps.places[near] / CELL, wanted.places[near] / CELL, beta=0.1, reduction="sum")
    return (kinds + 0.4 * colours + 0.2 * large + places) / len(near)


def train(some: Pictures, steps: int, log: Any) -> Detector:
    """Train from random weights by AdamW with a cosine down to zero."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng([SEED, 1])
    model = Detector(**OPTIONS).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.02)
    started, recent = time.process_time(), []
    images, wanted = batch(rng, some, BATCH)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        if step % 2 == 0:
            images, wanted = batch(rng, some, BATCH)
        elif images.grad is not None:
            length = images.grad.flatten(1).norm(dim=1).clamp_min(1e-12)
            far = torch.from_numpy(rng.uniform(0, ADVERSARY, BATCH).astype(np.float32))
            images = images.detach() + (far / length)[:, None, None, None] * images.grad
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_(True)
        loss = loss_of(model(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            plain, moved = np.mean(recent[::2]), np.mean(recent[1::2])
            log(f"step {step + 1} loss {plain:.3f} moved {moved:.3f} cpu {time.process_time() - started:.0f} s")
            recent.clear()
    return model.eval().requires_grad_(False)


def main(args: argparse.Namespace) -> None:
    """Train the detector unless --work has it, calibrate it and write it with what it tells apart."""
    vae = AutoencoderKL.from_pretrained(args.work / "vae_looks").eval().requires_grad_(False)
    if not (args.work / "detector.json").exists():
        started = time.process_time()
        some = pictures(args.work, vae, SEED)
        print(f"{len(some.images)} pictures, cpu {time.process_time() - started:.0f} s", flush=True)
        steps = args.steps or STEPS
        model = train(some, steps, lambda line: print(line, flush=True))
        torch.save(model.state_dict(), args.work / "detector.pt")
        cpu = time.process_time() - started
        record(args.work, "detector", seed=SEED, steps=steps, batch=BATCH, cpu=cpu, pictures=len(some.images))
    publish(args.work, OPTIONS, vae)
