"""The grammar of captions: 40 words, at most 12 of them in a caption; a claim can be written in several ways.

`captions` writes a claim, `claim_of` reads one.
"""

from __future__ import annotations

import re
from itertools import product

import numpy as np

from .combinations import COLOURS, SHAPES
from .world import RELATIONS, SIZES, Claim, Part

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


_COUNT_WORDS = {word: count for count, word in NUMBERS.items()} | dict.fromkeys(("a", "an", "one"), 1)
_LINKS: dict[str, str | None] = {"and": None} | {
    f"{lead}{relation}": relation
    for relation in RELATIONS
    for lead in (("to the ", "") if relation.endswith("of") else ("",))
}  # the longer one of two that fit comes first


def claim_of(text: str) -> Claim:
    """The claim that a sentence of the grammar states; upper case and punctuation do not matter.

    Raises ValueError for what is no such sentence.
    """
    words = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    words = re.sub("^a (photo|picture) of ", "", words)
    try:
        for link, relation in _LINKS.items():
            first, found, second = words.partition(f" {link} ")
            if found:
                return Claim((_part(first, single=True), _part(second, single=True)), relation)
        return Claim((_part(words),))
    except ValueError as error:
        raise ValueError(f"{text!r} is no sentence of the shapes grammar: {error}") from error


def _part(phrase: str, single: bool = False) -> Part:
    """The part that a noun phrase names; single: it may be of one thing only."""
    words = phrase.removeprefix("only ").split()
    count = _COUNT_WORDS.get(words[0], 0) if words else 0
    if count == 0 or (single and count > 1):
        raise ValueError(f"{phrase!r} does not begin with {'an article' if single else 'an article or a number'}")
    words = words[1:]
    if count == 1 and words[:1] == ["single"]:
        words = words[1:]
    size = words.pop(0) if words and words[0] in SIZES else None
    colour = words.pop(0) if words and words[0] in COLOURS else None
    shapes = {(PLURALS[shape] if count > 1 else shape): shape for shape in SHAPES}
    if len(words) != 1 or words[0] not in shapes:
        raise ValueError(f"{phrase!r} does not end with one of {', '.join(shapes)}")
    return Part(shapes[words[0]], count, colour, size)
