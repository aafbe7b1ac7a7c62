"""The data types of the embedded domain: scenes of coloured shapes, and the claims that prompts make about them.

Six skills after GenEval: single object, colour, counting, two objects, position, attribute binding. A claim states all
shapes in the picture and their counts, and some of the colours, sizes and relations; the rest varies freely.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations as choose
from typing import Any

from .combinations import Combination

SKILLS = ("single_object", "colour", "counting", "two_objects", "position", "attribute_binding")
SKILL_WEIGHTS = (0.10, 0.12, 0.18, 0.18, 0.21, 0.21)  # the probability of each skill in `sample_prompt`
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
    """The contents of a picture; `background` is an RGB triple in [0, 255]."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """`count` things of one shape; a colour or size of None is free."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Claim:
    """The claim of a prompt: exactly these parts and nothing else; `relation` is between part 0 and part 1."""

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
    """A caption, the skill that it tests and the claim that it states."""

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
    """The combination of a relation; "a right of b" is the same as "b left of a"."""
    if relation in ("right of", "below"):
        first, second = second, first
    return ("fact", "left" if relation in ("left of", "right of") else "above", first, second)


def binding(a: tuple[str, str], b: tuple[str, str]) -> Combination:
    """The combination of two coloured shapes, in either order."""
    return ("binding", *(word for thing in sorted((a, b)) for word in thing))


def scene_combinations(scene: Scene) -> set[Combination]:
    """Every combination that a scene shows, whether its caption names it or not."""
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
