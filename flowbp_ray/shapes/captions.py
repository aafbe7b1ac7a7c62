"""The grammar of captions: 40 words, at most 12 of them in a caption; a claim can be written in several ways."""

from __future__ import annotations

from itertools import product

import numpy as np

from .combinations import COLOURS, SHAPES
from .world import Claim, Part

PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
NUMBERS = {2: "two", 3: "three", 4: "four"}
FRAMES = ("", "a photo of ", "a picture of ")
ARTICLES = ("a", "one", "a single", "only one")
WORDS = (
    *SHAPES,
    *PLURALS.values(),
    *COLOURS,
    *NUMBERS.values(),
    *("a", "an", "one", "single", "only", "small", "large", "photo", "picture"),
    *("of", "and", "to", "the", "left", "right", "above", "below"),
)
MAX_WORDS = 12


def _noun(part: Part, article: str = "a") -> str:
    """A noun phrase such as "a small star", "an orange ring" or "three red crosses"."""
    words = [word for word in (part.size, part.colour) if word]
    if part.count > 1:
        return " ".join((NUMBERS[part.count], *words, PLURALS[part.shape]))
    if article == "a" and words and words[0][0] in "aeiou":
        article = "an"
    return " ".join((article, *words, part.shape))


def captions(claim: Claim) -> list[str]:
    """Every sentence of the grammar that states this claim, in a fixed order."""
    first = claim.parts[0]
    if len(claim.parts) == 1:
        if first.count > 1:
            return [f"{frame}{only}{_noun(first)}" for frame, only in product(FRAMES, ("", "only "))]
        return [f"{frame}{_noun(first, article)}" for frame, article in product(FRAMES, ARTICLES)]
    if claim.relation is None:
        orders = (claim.parts, claim.parts[::-1])
        return [f"{frame}{_noun(a)} and {_noun(b)}" for frame, (a, b) in product(FRAMES, orders)]
    links = [claim.relation]
    if claim.relation in ("left of", "right of"):
        links.append(f"to the {claim.relation}")
    return [f"{frame}{_noun(first)} {link} {_noun(claim.parts[1])}" for frame, link in product(FRAMES, links)]


def caption(rng: np.random.Generator, claim: Claim) -> str:
    """Draw one of the sentences that state this claim."""
    sentences = captions(claim)
    return sentences[rng.integers(len(sentences))]
