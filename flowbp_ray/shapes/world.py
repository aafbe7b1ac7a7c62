"""The embedded domain: scenes of coloured shapes, what a prompt claims about them, and how both are drawn.

Six skills after GenEval: single object, colour, counting, two objects, position, attribute binding. A claim states
everything that is in the picture (shapes and how many), and some of the colours, sizes and relations; what it leaves
open varies freely. Numpy only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations as choose
from typing import Any

import numpy as np

from .combinations import COLOURS, COUNTS, SHAPES, Combination, is_held_out

SKILLS = ("single_object", "colour", "counting", "two_objects", "position", "attribute_binding")
SKILL_WEIGHTS = (0.10, 0.12, 0.18, 0.18, 0.21, 0.21)  # how often a sampled scene shows each
RELATIONS = ("left of", "right of", "above", "below")
SIZES = {"small": (8.0, 10.0), "large": (13.0, 16.0)}  # radius in pixels
SIZE_BOUNDARY = 11.5
CANVAS = 64
REACH = {"square": 1.22, "triangle": 1.24}  # corners lie further out than the radius; 1 for the other shapes
GAP = 4.0  # pixels kept free between two things and at the border of the picture
RELATION_COSINE = 0.5  # "left of" holds within 60 degrees of straight left


@dataclass(frozen=True)
class Thing:
    """One object: centre (x to the right, y downwards) and radius `size`, in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture; `background` is an RGB triple in [0, 255]."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """`count` things of one shape; colour and size are free where they are None."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a prompt states: exactly these parts and nothing else; `relation` is between part 0 and part 1."""

    parts: tuple[Part, ...]
    relation: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Claim:
        return cls(tuple(Part(**part) for part in data["parts"]), data.get("relation"))

    @property
    def colour_free(self) -> bool:
        """Whether no colour is stated at all."""
        return all(part.colour is None for part in self.parts)


@dataclass(frozen=True)
class Prompt:
    """A caption, the skill that it tests and the claim that it makes."""

    text: str
    skill: str
    claim: Claim

    def to_json(self) -> dict[str, Any]:
        return {"prompt": self.text, "skill": self.skill, "claim": self.claim.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Prompt:
        return cls(data["prompt"], data["skill"], Claim.from_json(data["claim"]))


def holds(relation: str, first: Thing, second: Thing) -> bool:
    """Whether `first` is left of / right of / above / below `second`."""
    dx, dy = second.x - first.x, second.y - first.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return along > RELATION_COSINE * math.hypot(dx, dy)


def fact(relation: str, first: str, second: str) -> Combination:
    """The combination behind a relation; "a right of b" is "b left of a"."""
    if relation in ("right of", "below"):
        first, second = second, first
    return ("fact", "left" if relation in ("left of", "right of") else "above", first, second)


def binding(a: tuple[str, str], b: tuple[str, str]) -> Combination:
    """The combination of two coloured shapes, in either order."""
    return ("binding", *(word for thing in sorted((a, b)) for word in thing))


def scene_combinations(scene: Scene) -> set[Combination]:
    """Every combination that a scene shows, named by its caption or not."""
    things = scene.things
    keys: set[Combination] = {("colour", t.shape, t.colour) for t in things}
    if len(things) > 1 and len({(t.shape, t.colour) for t in things}) == 1:
        keys.add(("count", str(len(things)), things[0].shape, things[0].colour))
    for a, b in choose(things, 2):
        if a.shape == b.shape:
            continue
        keys.add(("pair", *sorted((a.shape, b.shape))))
        keys.add(binding((a.shape, a.colour), (b.shape, b.colour)))
        keys.update(fact(r, a.shape, b.shape) for r in RELATIONS if holds(r, a, b))
    return keys


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
    """Training prompts name no held-out combination; held-out ones name exactly one, of their skill's own kind."""
    novel = [key for key in claim_combinations(prompt) if is_held_out(key)]
    if split == "train":
        return not novel
    return [key[0] for key in novel] == [HELD_OUT_KIND[prompt.skill]]


def sample_claim(rng: np.random.Generator, skill: str) -> Claim:
    """Draw what a prompt of this skill states, held out or not."""

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
    """Centres at which things of this radius and reach keep GAP from each other and half of it from the border."""
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
