"""The training loop of both reward models: what is minimised, and on what."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.make_shapes.reading import learn_to_read
from benchmarks.make_shapes.rewards_damage import augment
from benchmarks.make_shapes.rewards_data import Batch, make_batch
from benchmarks.make_shapes.rewards_helper import Helper
from flowbp_ray.rewards.shapes_clip import Words
from flowbp_ray.rewards.towers import Towers, build_towers

MAX_SCALE = 40.0


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    adversary: largest L2 norm of the perturbation in the second pass over a batch. reading: steps in which the text
    tower alone learns to read, before the pictures come.
    """

    architecture: str
    options: dict[str, Any]
    seed: int
    steps: int
    loss: str  # "softmax" | "sigmoid"
    side: int  # cells per side of the image tower's last map
    width: int  # channels of that map
    pairs: int = 36
    damaged: int = 24
    wrong: int = 3
    rate: float = 1.5e-3
    adversary: float = 0.0
    reading: int = 1500


def contrast(seen: Tensor, said: Tensor, wrong: Tensor, batch: Batch, helper: Helper, kind: str) -> Tensor:
    """The loss over cosines. seen [R, D], said [C, D], wrong [C, n, D], all normalised; C clean rows come first.

    softmax: each picture picks its caption among its hard negatives and the batch's captions that are false for it;
    each caption picks its picture among those it is false for, damaged ones included; and a sigmoid on each own pair,
    so that one threshold fits all captions. sigmoid: every pair on its own, plus the choice among hard negatives.
    """
    clean = len(said)
    scale = helper.scale.exp().clamp(max=MAX_SCALE)
    table = seen @ said.T  # [R, C]
    hard = torch.einsum("cd,cnd->cn", seen[:clean], wrong)
    truth = torch.from_numpy(batch.truth)
    own, zero = table[:clean].diagonal(), torch.zeros(clean, dtype=torch.long)
    rivals = table.masked_fill(truth, -10.0)  # finite: the scale is learned, and 0 * inf is not 0
    logits = torch.cat([own[:, None], hard], dim=1)
    mates = [batch.texts[:clean].index(text) for text in batch.texts[clean:]]
    spoiled = table[clean:][torch.arange(len(mates)), mates] if mates else table.new_zeros(0)
    damaged_label = torch.from_numpy(batch.own[clean:])

    def sigmoid(cosines: Tensor, label: bool) -> Tensor:
        z = scale * cosines + helper.bias
        return F.softplus(-z if label else z).mean() if cosines.numel() else cosines.sum()

    ones = torch.cat([own, spoiled[damaged_label]])
    zeros = torch.cat([hard.flatten(), spoiled[~damaged_label], spoiled[~damaged_label]])
    if kind == "sigmoid":
        apart = sigmoid(ones, True) + sigmoid(zeros, False) + sigmoid(table[~truth], False)
        return apart + F.cross_entropy(scale * logits, zero)
    pick_caption = F.cross_entropy(scale * torch.cat([logits, rivals[:clean]], dim=1), zero)
    pick_picture = F.cross_entropy(scale * torch.cat([own[:, None], rivals.T], dim=1), zero)
    return pick_caption + pick_picture + 0.5 * (sigmoid(ones, True) + sigmoid(zeros, False))


def train(
    recipe: Recipe,
    words: Words,
    log: Callable[[str], None],
    save: Callable[[nn.Module], None],
) -> Towers:
    """Train towers by the recipe: clean pictures first, then noise, then adversaries.

    Each batch is used twice; once adversaries are on, the second time moved along the input gradient of the first.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng([recipe.seed, 0])
    model = build_towers(recipe.architecture, recipe.options)
    helper = Helper(recipe.width, recipe.options["projection"])
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in (*model.parameters(), *helper.parameters()) if all(p is not q for q in decay)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.98),
    )
    started, recent = time.process_time(), []

    def encode(texts: list[str]) -> Tensor:
        return F.normalize(model.encode_texts(torch.tensor([words(text) for text in texts])), dim=-1) * 8.0

    learn_to_read(encode, [*model.parameters(), *helper.parameters()], helper, rng, recipe.rate, recipe.reading, log)
    batch, pixels = None, torch.empty(0)
    for step in range(recipe.steps):
        progress = step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * progress))
        if batch is None or step % 2 == 0:
            batch = make_batch(rng, recipe.pairs, recipe.damaged, recipe.wrong)
        adversary = recipe.adversary * ramp(progress, 0.45, 0.75)
        if step % 2 == 0 or adversary == 0:
            whole = torch.from_numpy(batch.images).permute(0, 3, 1, 2).float() / 255
            pixels = augment(rng, whole, noise=0.01 + 0.14 * ramp(progress, 0.15, 0.5))
        else:
            pixels = _pushed(rng, pixels, adversary)
        pixels.requires_grad_(recipe.adversary > 0)
        loss, accuracy = _losses(model, helper, words, batch, pixels, recipe, 1.0 - 0.7 * progress)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *helper.parameters()], 1.0)
        optimizer.step()
        recent.append((loss.item(), accuracy))
        if (step + 1) % 50 == 0:
            mean, right = np.mean(recent, axis=0)
            cpu = time.process_time() - started
            log(f"step {step + 1} loss {mean:.3f} right of {recipe.wrong + 1}: {right:.3f} cpu {cpu:.0f} s")
            recent.clear()
        if (step + 1) % 200 == 0:
            save(model)
    return model


def ramp(progress: float, start: float, stop: float) -> float:
    """0 before start, 1 after stop, straight in between: pictures are clean at first and get harder."""
    return min(1.0, max(0.0, (progress - start) / (stop - start)))


def _pushed(rng: np.random.Generator, pixels: Tensor, radius: float) -> Tensor:
    """Move each image up its loss gradient by an L2 distance drawn from [0, radius] ("free" adversarial training)."""
    if pixels.grad is None or radius == 0:
        return pixels.detach()
    length = pixels.grad.flatten(1).norm(dim=1).clamp_min(1e-12)
    far = torch.from_numpy(rng.uniform(0, radius, len(pixels)).astype(np.float32))
    return pixels.detach() + (far / length)[:, None, None, None] * pixels.grad


def _losses(
    model: Towers, helper: Helper, words: Words, batch: Batch, pixels: Tensor, recipe: Recipe, share: float
) -> tuple[Tensor, float]:
    """The whole loss of one pass, and how often the right caption beats its hard negatives."""
    clean = len(batch.scenes)
    cells, embedding = model.patches(pixels)
    texts = [*batch.texts[:clean], *(text for row in batch.wrong for text in row)]
    distinct = sorted(set(texts))
    where = {text: i for i, text in enumerate(distinct)}
    encoded = F.normalize(model.encode_texts(torch.tensor([words(text) for text in distinct])), dim=-1)
    encoded = encoded[[where[text] for text in texts]]
    said, wrong = encoded[:clean], encoded[clean:].unflatten(0, (clean, -1))
    seen = F.normalize(embedding, dim=-1)
    loss = contrast(seen, said, wrong, batch, helper, recipe.loss)
    aid = helper.loss(cells[:clean], seen[:clean] * 8.0, batch.scenes, recipe.side)
    with torch.no_grad():
        own = (seen[:clean] * said).sum(-1)
        right = (own[:, None] > torch.einsum("cd,cnd->cn", seen[:clean], wrong)).all(1).float().mean().item()
    return loss + share * (aid + helper.text_loss(encoded * 8.0, batch.claims)), right
