"""Random sampling of scenes and prompts."""

from __future__ import annotations

import math

import numpy as np

from flowbp_ray.shapes.world import (
    CANVAS,
    GAP,
    REACH,
    RELATIONS,
    SIZES,
    SKILL_WEIGHTS,
    SKILLS,
    Claim,
    Part,
    Prompt,
    Scene,
    Thing,
    binding,
    fact,
    holds,
    scene_combinations,
)

from .combinations import COLOURS, COUNTS, SHAPES, Combination, is_held_out


def claim_combinations(prompt: Prompt) -> set[Combination]:
    """Every combination that a caption names."""
    parts = prompt.claim.parts
    keys: set[Combination] = {("colour", p.shape, p.colour) for p in parts if p.colour is not None}
    if prompt.skill == "single_object":
        keys.add(("sentence", prompt.text))
    if len(parts) == 1 and parts[0].count > 1 and parts[0].colour is not None:
        keys.add(("count", str(parts[0].count), parts[0].shape, parts[0].colour))
    if len(parts) == 2:
        a, b = parts
        keys.add(("pair", *sorted((a.shape, b.shape))))
        if a.colour is not None and b.colour is not None:
            keys.add(binding((a.shape, a.colour), (b.shape, b.colour)))
        if prompt.claim.relation is not None:
            keys.add(fact(prompt.claim.relation, a.shape, b.shape))
    return keys


HELD_OUT_KIND = {
    "single_object": "sentence",
    "colour": "colour",
    "counting": "count",
    "two_objects": "pair",
    "position": "fact",
    "attribute_binding": "binding",
}


def in_split(prompt: Prompt, split: str) -> bool:
    """Whether a prompt belongs to a split.

    A training prompt names no held-out combination. A held-out prompt names exactly one, of the kind of its skill.
    """
    novel = [key for key in claim_combinations(prompt) if is_held_out(key)]
    if split == "train":
        return not novel
    return [key[0] for key in novel] == [HELD_OUT_KIND[prompt.skill]]


def sample_claim(rng: np.random.Generator, skill: str) -> Claim:
    """Draw the claim of a prompt of this skill, held out or not."""

    def colour() -> str:
        return str(rng.choice(list(COLOURS)))

    first, second = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    if skill == "single_object":
        size = (None, None, "small", "large")[rng.integers(4)]
        return Claim((Part(first, size=size),))
    if skill == "colour":
        return Claim((Part(first, colour=colour()),))
    if skill == "counting":
        return Claim((Part(first, int(rng.choice(COUNTS)), colour() if rng.random() < 0.5 else None),))
    if skill == "attribute_binding":
        one, two = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
        return Claim((Part(first, colour=one), Part(second, colour=two)))
    colours: list[str | None] = [None, None]
    if rng.random() < 0.5:  # one of the two is coloured
        colours[rng.integers(2)] = colour()
    relation = str(rng.choice(RELATIONS)) if skill == "position" else None
    return Claim((Part(first, colour=colours[0]), Part(second, colour=colours[1])), relation)


def sample_prompt(rng: np.random.Generator, split: str, skill: str | None = None) -> Prompt:
    """Draw a prompt of the split ("train" or "heldout"); the skill is drawn too unless it is given."""
    from .captions import caption

    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    skill = skill or str(rng.choice(SKILLS, p=SKILL_WEIGHTS))
    while True:
        claim = sample_claim(rng, skill)
        prompt = Prompt(caption(rng, claim), skill, claim)
        if in_split(prompt, split):
            return prompt


def _place(rng: np.random.Generator, sizes: list[float], reach: list[float]) -> list[tuple[float, float]] | None:
    """Draw centres so that things with these reaches keep GAP from each other and half of it from the border.

    Returns None if it finds no place for a thing in 20 attempts.
    """
    centres: list[tuple[float, float]] = []
    for i, size in enumerate(sizes):
        low, high = size + GAP / 2, CANVAS - size - GAP / 2
        for _ in range(20):
            x, y = rng.uniform(low, high, 2)
            if all(math.hypot(x - a, y - b) >= reach[i] + r + GAP for (a, b), r in zip(centres, reach, strict=False)):
                centres.append((float(x), float(y)))
                break
        else:
            return None
    return centres


def _background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light colour of low saturation, far from every colour in the palette."""
    level = rng.uniform(214, 246)
    tint = rng.uniform(-9, 9, 3)
    r, g, b = np.clip(level + tint, 0, 255).round().astype(int)
    return int(r), int(g), int(b)


def _size(rng: np.random.Generator, part: Part, total: int) -> float:
    if part.size is not None:
        return float(rng.uniform(*SIZES[part.size]))
    return float(rng.uniform(8.0, {1: 16.0, 2: 13.0}.get(total, 10.5)))


def sample_scene(rng: np.random.Generator, claim: Claim, split: str = "train") -> Scene:
    """Draw a scene that satisfies the claim; in the training split it shows no held-out combination."""
    parts = [part for part in claim.parts for _ in range(part.count)]
    while True:
        sizes = [_size(rng, part, len(parts)) for part in parts]
        centres = _place(rng, sizes, [s * REACH.get(p.shape, 1.0) for s, p in zip(sizes, parts, strict=True)])
        if centres is None:
            continue
        colours = [part.colour or str(rng.choice(list(COLOURS))) for part in parts]
        things = tuple(
            Thing(p.shape, c, x, y, s) for p, c, (x, y), s in zip(parts, colours, centres, sizes, strict=True)
        )
        scene = Scene(things, _background(rng))
        if claim.relation is not None and not holds(claim.relation, things[0], things[1]):
            continue
        if split == "train" and any(is_held_out(key) for key in scene_combinations(scene)):
            continue
        return scene


def sample(rng: np.random.Generator, split: str, skill: str | None = None) -> tuple[Scene, Prompt]:
    """Draw a prompt of the split and a scene that satisfies it."""
    prompt = sample_prompt(rng, split, skill)
    return sample_scene(rng, prompt.claim, split), prompt
