"""Pictures for the detector, and what lies in each cell of them: drawn, spoiled, redrawn by the decoder, sampled.

What a picture shows is what the exact verifier reads in that very picture, so that a thing which a damage or the
decoder has spoiled is junk, and one that survived is still a thing, whatever the look. Training scenes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from flowbp_ray.backbones.base import uint8_images, unit_images
from flowbp_ray.rewards.shapes_maps import CELL, JUNK, KINDS, NOTHING, SIDE
from flowbp_ray.shapes import render, sample
from flowbp_ray.shapes.combinations import COLOURS
from flowbp_ray.shapes.look import sample_look
from flowbp_ray.shapes.verifier import UNKNOWN, examine
from flowbp_ray.shapes.world import CANVAS, SIZE_BOUNDARY, Thing

from .rewards_damage import augment, damage
from .vae import to_pixels

DRAWN, REDRAWN, SAMPLED = 2800, 2400, 2600  # pictures of each kind
SPOILED = 0.35  # of the drawn and redrawn ones
GRAIN = 0.1  # largest standard deviation of the noise on standardised latents before decoding
MOST = 12  # things a picture that are kept; more are dropped with their picture
REACH = 0.75  # cells, along each axis, from whose middle a thing's colour, size and place are learned
SHIFT = 2  # pixels


@dataclass(frozen=True)
class Pictures:
    """images: uint8 [P, 64, 64, 3]. things: float32 [P, MOST, 5], rows of x, y, kind, colour, large; kind 0 is none."""

    images: np.ndarray
    things: np.ndarray


def row(thing: Thing) -> list[float]:
    """One thing as a row of `Pictures.things`."""
    known = UNKNOWN not in (thing.shape, thing.colour)
    kind = KINDS.index(thing.shape) if known else JUNK
    colour = list(COLOURS).index(thing.colour) if known else 0
    return [thing.x, thing.y, kind, colour, float(thing.size > SIZE_BOUNDARY)]


def read_all(images: np.ndarray) -> Pictures:
    """Pictures [P, 64, 64, 3] and what the verifier reads in them; those without a background are left out."""
    kept, things = [], np.zeros((len(images), MOST, 5), np.float32)
    for index, image in enumerate(images):
        reading = examine(image)
        if reading is None or len(reading.outlines) > MOST:
            continue
        for place, outline in enumerate(reading.outlines):
            things[index, place] = row(outline.thing)
        kept.append(index)
    return Pictures(images[kept], things[kept])


@torch.no_grad()
def redraw(rng: np.random.Generator, vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Pictures [P, 64, 64, 3] through the autoencoder, with a little noise on their latents, as generated ones have."""
    out = []
    for start in range(0, len(images), 50):
        latents = vae.encode(to_pixels(images[start : start + 50])).latent_dist.mode()
        strength = torch.from_numpy(rng.uniform(0, GRAIN, (len(latents), 1, 1, 1)).astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        latents = latents + strength / vae.config.scaling_factor * noise
        out.append(uint8_images(unit_images(vae.decode(latents).sample)))
    return np.concatenate(out)


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Training scenes, each in a look of its own, or spoiled: uint8 [count, 64, 64, 3]."""
    scenes = (sample(rng, "train")[0] for _ in range(count))
    return np.stack([damage(rng, s) if rng.random() < SPOILED else render(s, sample_look(rng)) for s in scenes])


def pictures(work: Path, vae: AutoencoderKL, seed: int) -> Pictures:
    """All pictures, made once and kept in work/detector.npz. The samples are those of the stage `preference`."""
    file = work / "detector.npz"
    if not file.exists():
        rng = np.random.default_rng([seed, 0])
        samples = np.load(work / "choices.npz")["pictures"].reshape(-1, CANVAS, CANVAS, 3)
        samples = samples[np.sort(rng.permutation(len(samples))[:SAMPLED])]
        made = read_all(np.concatenate([draw(rng, DRAWN), redraw(rng, vae, draw(rng, REDRAWN)), samples]))
        np.savez_compressed(file, images=made.images, things=made.things)
    stored = np.load(file)
    return Pictures(stored["images"], stored["things"])


@dataclass(frozen=True)
class Targets:
    """kinds: int64 [B, 64]. near: bool [B, 64], where the others hold: colours int64, large float, places [.., 2]."""

    kinds: Tensor
    near: Tensor
    colours: Tensor
    large: Tensor
    places: Tensor


def targets(things: np.ndarray) -> Targets:
    """What each cell should say, from things [B, MOST, 5]. Two things with their centres in one cell make it junk."""
    batch = len(things)
    kinds = np.full((batch, SIDE * SIDE), NOTHING)
    line = CELL * (np.arange(SIDE) + 0.5)
    middles = np.stack([np.tile(line, SIDE), np.repeat(line, SIDE)], -1)  # [64, 2]
    there = things[..., 2] > 0
    cells = (things[..., :2] // CELL).astype(int).clip(0, SIDE - 1)
    for b, k in zip(*there.nonzero(), strict=True):
        cell = cells[b, k, 1] * SIDE + cells[b, k, 0]
        kinds[b, cell] = things[b, k, 2] if kinds[b, cell] == NOTHING else JUNK
    far = np.abs(things[:, None, :, :2] - middles[None, :, None]).max(-1) / CELL  # [B, 64, MOST]
    far = np.where((there & (things[..., 2] != JUNK))[:, None], far, np.inf)
    nearest = far.argmin(-1)
    chosen = np.take_along_axis(things, nearest[..., None], 1)
    return Targets(
        torch.from_numpy(kinds),
        torch.from_numpy(far.min(-1) < REACH),
        torch.from_numpy(chosen[..., 3]).long(),
        torch.from_numpy(chosen[..., 4]),
        torch.from_numpy(chosen[..., :2]),
    )


def batch(rng: np.random.Generator, some: Pictures, size: int) -> tuple[Tensor, Targets]:
    """Random pictures as float [size, 3, 64, 64] in 0..1, mirrored, moved, blurred and noised, and their targets."""
    index = rng.integers(len(some.images), size=size)
    images = torch.from_numpy(some.images[index]).permute(0, 3, 1, 2).float() / 255
    things = some.things[index].copy()
    mirrored = rng.random(size) < 0.5  # every shape is its own mirror image
    images = torch.where(torch.from_numpy(mirrored)[:, None, None, None], images.flip(-1), images)
    things[mirrored, :, 0] = CANVAS - things[mirrored, :, 0]
    moves = rng.integers(-SHIFT, SHIFT + 1, (size, 2))
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    rows = zip(padded, moves.tolist(), strict=True)
    images = torch.stack([p[:, SHIFT - y :, SHIFT - x :][:, :CANVAS, :CANVAS] for p, (x, y) in rows])
    things[..., :2] += moves[:, None]
    return augment(rng, images, noise=0.06, shift=0), targets(things)
