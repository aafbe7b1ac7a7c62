"""What the reward models know, measured on scenes they never saw, and the card that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.make_shapes.rewards_damage import KINDS, augment, damage
from benchmarks.make_shapes.rewards_data import false_claim, say
from flowbp_ray.rewards.shapes_clip import WEIGHTS, ShapesClip
from flowbp_ray.shapes.captions import captions
from flowbp_ray.shapes.render import render
from flowbp_ray.shapes.sampling import sample
from flowbp_ray.shapes.verifier import verify
from flowbp_ray.shapes.world import SKILLS, Claim, Scene

WRONG = 8  # hard negatives per picture
PER_SKILL = 100


def as_images(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [64, 64, 3] each -> float [B, 3, 64, 64] in 0..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def draw(rng: np.random.Generator, split: str, skill: str, count: int) -> list[tuple[Scene, Claim, str]]:
    """Fresh scenes of one skill with their claims and captions."""
    pairs = [sample(rng, split, skill) for _ in range(count)]
    return [(scene, prompt.claim, prompt.text) for scene, prompt in pairs]


@torch.no_grad()
def hard_negatives(
    reward: ShapesClip, rng: np.random.Generator, split: str, skill: str, count: int = PER_SKILL, noisy: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines of true captions [B] and of WRONG hard negatives [B, WRONG] on fresh scenes of one skill."""
    rows = draw(rng, split, skill, count)
    images = as_images([render(scene) for scene, _, _ in rows])
    if noisy:
        images = augment(rng, images)
    novel = split != "train"
    texts = [[say(rng, false_claim(rng, c, s, novel), novel) for _ in range(WRONG)] for s, c, _ in rows]
    true = reward.cosine(images, [text for _, _, text in rows])
    wrong = [reward.cosine(images, [row[i] for row in texts]) for i in range(WRONG)]
    return true, torch.stack(wrong, dim=1)


def calibrate(name: str, root: Any = WEIGHTS, count: int = 60) -> dict[str, float]:
    """Mean cosine of wrong (low) and true (high) captions over all skills, fresh training-split scenes, augmented."""
    reward, rng = ShapesClip(root / name), np.random.default_rng(2024)
    found = [hard_negatives(reward, rng, "train", skill, count, noisy=True) for skill in SKILLS]
    true, wrong = torch.cat([t for t, _ in found]), torch.cat([w for _, w in found])
    return {"low": round(wrong.mean().item(), 4), "high": round(true.mean().item(), 4)}


@torch.no_grad()
def exchange_cosine(reward: ShapesClip, rng: np.random.Generator, skill: str, count: int = PER_SKILL) -> float:
    """Mean cosine of a caption's embedding with that of the caption in which its two things trade places or colours."""
    found = []
    for _, claim, text in draw(rng, "heldout", skill, count):
        a, b = claim.parts
        parts = (b, a) if skill == "position" else (replace(a, colour=b.colour), replace(b, colour=a.colour))
        said, exchanged = reward.embed([text, captions(replace(claim, parts=parts))[0]])
        found.append(F.cosine_similarity(said, exchanged, dim=0))
    return torch.stack(found).mean().item()


def area_under(good: Tensor, bad: Tensor) -> float:
    """Probability that a good picture scores above a bad one."""
    return (good[:, None] > bad[None]).float().mean().item()


@torch.no_grad()
def damage_auc(reward: ShapesClip, rng: np.random.Generator, kind: str, count: int = 100) -> tuple[float, float]:
    """AUC over all pictures, and share of pictures that beat their own damaged version; verified-false damage only."""
    good: list[np.ndarray] = []
    bad: list[np.ndarray] = []
    texts: list[str] = []
    while len(texts) < count:
        scene, prompt = sample(rng, "heldout")
        spoiled = damage(rng, scene, kind)
        if not verify(spoiled, prompt):
            good.append(render(scene))
            bad.append(spoiled)
            texts.append(prompt.text)
    whole, broken = reward.cosine(as_images(good), texts), reward.cosine(as_images(bad), texts)
    return area_under(whole, broken), (whole > broken).float().mean().item()


def report(name: str) -> dict[str, Any]:
    """Accuracy per skill and split, AUC per kind of damage, and the facts that the config holds."""
    reward, rng = ShapesClip(WEIGHTS / name), np.random.default_rng(99)
    skills = {}
    for skill in SKILLS:
        row = {}
        for split in ("train", "heldout"):
            true, wrong = hard_negatives(reward, rng, split, skill)
            row[f"{split}_pairwise"] = (true[:, None] > wrong).float().mean().item()
            row[f"{split}_best_of_9"] = (true[:, None] > wrong).all(1).float().mean().item()
        skills[skill] = row
    config = json.loads((WEIGHTS / name / "config.json").read_text())
    return {
        "skills": skills,
        "damage": {kind: damage_auc(reward, rng, kind) for kind in KINDS},
        "exchange": {skill: exchange_cosine(reward, rng, skill) for skill in ("position", "attribute_binding")},
        "training": config["training"],
        "architecture": config["architecture"],
        "calibration": config["calibration"],
        "bytes": (WEIGHTS / name / "model.safetensors").stat().st_size,
    }


def write_card(reports: dict[str, dict[str, Any]], digests: dict[str, str]) -> None:
    """Write README.md beside the weights."""
    lines = [
        "# Reward models of the shapes domain", "",
        "Two small CLIP-like models, trained from scratch on renderings by `python -m benchmarks.make_shapes rewards`",
        "(one thread; one seed each; a repeated run has not been compared bit for bit). Runs train on `shapes_clip`;",
        "`shapes_clip_heldout` is only ever reported.",
        "Both saw training-split scenes only: no picture, caption or wrong caption with a held-out combination.", "",
        "| | architecture | parameters | bytes (fp16) | seed | steps x images | loss | CPU s | cosine low / high |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, r in reports.items():
        t, c = r["training"], r["calibration"]
        lines.append(
            f"| {name} | {r['architecture']} | {t['parameters']:,} | {r['bytes']:,} | {t['seed']} | "
            f"{t['steps']} x "
            f"{t['batch']} | {t['loss']} | {t['cpu_seconds']} | {c['low']} / {c['high']} |"
        )
    lines += [
        "", f"## Right caption against hard negatives ({PER_SKILL} fresh scenes per skill and split)", "",
        f"Pairwise: against one of {WRONG}; best: against all {WRONG} at once.", "",
        "| skill | " + " | ".join(f"{n}: train pairwise, best / held-out pairwise, best" for n in reports) + " |",
        "|---|" + "---|" * len(reports),
    ]  # fmt: skip
    for skill in [*SKILLS, "mean"]:
        cells = []
        for r in reports.values():
            rows = [r["skills"][skill]] if skill != "mean" else list(r["skills"].values())
            m = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            cells.append(
                f"{m['train_pairwise']:.1%}, {m['train_best_of_9']:.0%} / "
                f"{m['heldout_pairwise']:.1%}, {m['heldout_best_of_9']:.0%}"
            )
        lines.append(f"| {skill} | " + " | ".join(cells) + " |")
    lines += [
        "", "## Whole pictures against damaged ones (held-out scenes, same captions, damage the verifier rejects)", "",
        "| damage | " + " | ".join(f"{n}: AUC, own pair" for n in reports) + " |", "|---|" + "---|" * len(reports),
    ]  # fmt: skip
    for kind in KINDS:
        lines.append(
            f"| {kind} | " + " | ".join("{:.3f}, {:.2f}".format(*r["damage"][kind]) for r in reports.values()) + " |"
        )
    lines += [
        "", "## What the text towers tell apart", "",
        "Mean cosine between a caption and the same caption with its two things exchanged; at 1 a model reads a bag of",
        "words, and its score cannot teach that skill. Before the text towers were taught to read captions on their",
        "own, all four figures were above 0.98.", "",
        "| skill | " + " | ".join(reports) + " |", "|---|" + "---|" * len(reports),
    ]  # fmt: skip
    for skill in ("position", "attribute_binding"):
        lines.append(f"| {skill} | " + " | ".join(f"{r['exchange'][skill]:.3f}" for r in reports.values()) + " |")
    lines += ["", "## Digests (sha256 of model.safetensors)", ""]
    lines += [f"- {name}: `{value}`" for name, value in digests.items()]
    (WEIGHTS / "README.md").write_text("\n".join(lines) + "\n")
