"""What the detector tells apart, beside the other rewards, by the exact verifier; its calibration and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from flowbp_ray.rewards import build
from flowbp_ray.rewards.shapes_clip import WEIGHTS
from flowbp_ray.rewards.shapes_detector import ShapesDetector
from flowbp_ray.rewards.shapes_maps import Detector
from flowbp_ray.shapes import load_prompts, render, sample, verify
from flowbp_ray.shapes.captions import captions
from flowbp_ray.shapes.look import sample_look
from flowbp_ray.shapes.sampling import sample_scene
from flowbp_ray.shapes.text import encode_prompts, load_models

from .detector_data import redraw
from .facts import recall
from .rewards_data import false_claim
from .rewards_report import area_under, as_images
from .sampling import decode, sample_latents, sigma_grid

NAME = "shapes_detector"
BESIDE = ("shapes_clip", NAME)
FRESH_SEED, NOISE_SEED = 2026, 303
SAMPLES, STEPS, GUIDANCES = 200, 16, (1.0, 3.0)
PAIRS = 240  # scenes and near misses
CALIBRATION = 240


@dataclass(frozen=True)
class Judged:
    """Pictures uint8 [P, 64, 64, 3], their captions, and whether the exact verifier finds them right, bool [P]."""

    images: np.ndarray
    texts: list[str]
    right: np.ndarray


def near_misses(rng: np.random.Generator, vae: AutoencoderKL, pairs: int) -> Judged:
    """Of held-out prompts a scene each, and one that a claim a step away describes; any look, drawn again."""
    images, prompts = [], []
    for _ in range(pairs):
        scene, prompt = sample(rng, "heldout")
        miss = sample_scene(rng, false_claim(rng, prompt.claim, scene, novel=True), "heldout")
        images += [render(each, sample_look(rng)) for each in (scene, miss)]
        prompts += [prompt, prompt]
    drawn = redraw(rng, vae, np.stack(images))
    right = np.array([verify(i, p) for i, p in zip(drawn, prompts, strict=True)])
    return Judged(drawn, [p.text for p in prompts], right)


@torch.no_grad()
def samples(guidance: float) -> Judged:
    """The base's pictures of prompts spread over the dev split, from fixed noise."""
    models, every = load_models(), load_prompts("dev")
    prompts = [every[i] for i in np.linspace(0, len(every) - 1, SAMPLES).round().astype(int)]
    noise = torch.randn(SAMPLES, 8, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED))
    negative, drawn = encode_prompts([""], models.tokenizer, models.text_encoder), []
    for start in range(0, SAMPLES, 50):
        some = slice(start, start + 50)
        text = encode_prompts([p.text for p in prompts[some]], models.tokenizer, models.text_encoder)
        latents = sample_latents(models.transformer, text, negative, noise[some], sigma_grid(STEPS, 1.0), guidance)
        drawn.append(decode(models.vae, latents))
    images = np.concatenate(drawn)
    right = np.array([verify(i, p) for i, p in zip(images, prompts, strict=True)])
    return Judged(images, [p.text for p in prompts], right)


@torch.no_grad()
def scores(reward: Any, images: np.ndarray, texts: Sequence[str]) -> Tensor:
    """Scores [P] of pictures uint8 [P, 64, 64, 3], 50 at a time."""
    steps = range(0, len(texts), 50)
    return torch.cat([reward.score(as_images(list(images[i : i + 50])), list(texts[i : i + 50])) for i in steps])


def area(reward: Any, judged: Judged) -> float:
    """Probability that a right picture scores above a wrong one, each with its own caption."""
    found, right = scores(reward, judged.images, judged.texts), torch.from_numpy(judged.right)
    return area_under(found[right], found[~right])


def calibrate(reward: ShapesDetector, vae: AutoencoderKL) -> dict[str, float]:
    """Mean agreement of wrong captions (low) and of true ones (high) with fresh scenes of the training split.

    Of those that survive the decoder; where none does, as after a try of few steps, of all.
    """
    rng = np.random.default_rng(FRESH_SEED)
    drawn = [sample(rng, "train") for _ in range(CALIBRATION)]
    images = redraw(rng, vae, np.stack([render(scene, sample_look(rng)) for scene, _ in drawn]))
    kept = [i for i, (_, prompt) in enumerate(drawn) if verify(images[i], prompt)] or [*range(CALIBRATION)]
    wrong = [captions(false_claim(rng, drawn[i][1].claim, drawn[i][0]))[0] for i in kept]
    low, high = (scores(reward, images[kept], t).mean().item() for t in (wrong, [drawn[i][1].text for i in kept]))
    return {"low": round(low, 3), "high": round(high, 3)}


def write(model: Detector, options: dict[str, Any], calibration: dict[str, float], facts: dict[str, Any]) -> None:
    """Write config.json and model.safetensors (fp16)."""
    folder = WEIGHTS / NAME
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = {"model": options, "calibration": calibration, "training": facts}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def publish(work: Path, options: dict[str, Any], vae: AutoencoderKL) -> None:
    """Calibrate the detector in work/detector.pt, write it, and report on it in the card of the rewards."""
    model = Detector(**options)
    model.load_state_dict(torch.load(work / "detector.pt", weights_only=True))
    facts: dict[str, Any] = dict(recall(work, "detector"))
    facts |= {"cpu": round(facts["cpu"]), "parameters": sum(p.numel() for p in model.parameters())}
    write(model, options, {"low": 0.0, "high": 1.0}, facts)
    write(model, options, calibrate(ShapesDetector(), vae), facts)
    sets = {"near misses": near_misses(np.random.default_rng([FRESH_SEED, 1]), vae, PAIRS)}
    sets |= {f"samples, guidance {g:g}": samples(g) for g in GUIDANCES}
    lines = ["| pictures | right / wrong | " + " | ".join(BESIDE) + " |", "|---" * (2 + len(BESIDE)) + "|"]
    for name, judged in sets.items():
        areas = " | ".join(f"{area(build(each), judged):.3f}" for each in BESIDE)
        lines.append(f"| {name} | {judged.right.sum()} / {(~judged.right).sum()} | {areas} |")
        print(lines[-1], flush=True)
    write_section(lines)


def write_section(table: list[str]) -> None:
    """Put the detector's section at the end of the card beside the weights, in the place of an older one."""
    card, file = WEIGHTS / "README.md", WEIGHTS / NAME / "model.safetensors"
    config = json.loads((WEIGHTS / NAME / "config.json").read_text())
    facts, calibration = config["training"], config["calibration"]
    lines = [
        f"## {NAME}", "",
        "A detector: for each cell of an 8 x 8 grid nothing, one of six shapes or junk, and its colour, size and",
        "place, learned from drawn, spoiled, redrawn and sampled pictures of the training split and what the exact",
        "verifier reads in each. The reward holds that against the claim (`flowbp_ray/rewards/shapes_claims.py`).",
        f"{facts['parameters']:,} parameters, {file.stat().st_size:,} bytes (fp16), seed {facts['seed']:.0f}, "
        f"{facts['steps']:.0f} x {facts['batch']:.0f} of {facts['pictures']:,.0f} pictures, {facts['cpu']} CPU s;",
        f"agreement low / high: {calibration['low']} / {calibration['high']}.", "",
        "Probability that a picture which the verifier finds right scores above one that it finds wrong, each with its",
        "own caption (held-out scenes and near misses in any look, drawn again by the decoder; the base's samples of",
        "shapes:dev):", "",
        *table, "",
        f"sha256 of model.safetensors: `{hashlib.sha256(file.read_bytes()).hexdigest()}`",
    ]  # fmt: skip
    kept = card.read_text().split(f"\n## {NAME}\n")[0].rstrip()
    card.write_text(kept + "\n\n" + "\n".join(lines) + "\n")
