"""The held-out combinations: chosen by a stable hash, and absent from every training scene and caption.

A combination is a tuple of words. There are five kinds, one for each compositional skill:

    ("colour", shape, colour)                    a thing of that shape in that colour
    ("count", n, shape, colour)                  n things of one shape, all of one colour
    ("pair", shape, shape)                       two shapes together (sorted)
    ("fact", axis, first, second)                first is left of / above second ("right of" and "below" mirrored)
    ("binding", shape, colour, shape, colour)    two coloured things together (sorted by shape)

No single shape can be held out, so for `single_object` sentences are held out: ("sentence", text).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations as choose

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 40),
    "orange": (246, 132, 20),
    "yellow": (240, 214, 30),
    "green": (36, 160, 60),
    "cyan": (30, 200, 220),
    "blue": (40, 70, 220),
    "purple": (142, 46, 176),
    "black": (26, 26, 30),
}
COUNTS = (2, 3, 4)
HELD_OUT_FRACTION = 0.2
HELD_OUT_SENTENCES = 0.6  # of the single-object sentences

Combination = tuple[str, ...]


def stable_hash(key: Combination) -> float:
    """A number in [0, 1) that depends only on the words of `key`, the same on every machine."""
    digest = hashlib.sha256("|".join(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _lowest(keys: Iterable[Combination], n: int) -> frozenset[Combination]:
    return frozenset(sorted(keys, key=stable_hash)[:n])


@lru_cache(maxsize=1)
def held_out_colours() -> frozenset[Combination]:
    """Ten of the 48 (shape, colour) pairs, at most two per shape and per colour, so that training shows each often."""
    chosen: list[Combination] = []
    for key in sorted((("colour", s, c) for s in SHAPES for c in COLOURS), key=stable_hash):
        if all(sum(other[i] == key[i] for other in chosen) < 2 for i in (1, 2)):
            chosen.append(key)
    return frozenset(chosen[:10])


@lru_cache(maxsize=1)
def held_out_pairs() -> frozenset[Combination]:
    """Three of the 15 shape pairs, with no shape in more than one of them."""
    chosen: list[Combination] = []
    for key in sorted((("pair", *sorted(p)) for p in choose(SHAPES, 2)), key=stable_hash):
        if not any(set(key[1:]) & set(other[1:]) for other in chosen):
            chosen.append(key)
    return frozenset(chosen[:3])


@lru_cache(maxsize=1)
def held_out_facts() -> frozenset[Combination]:
    """A fifth of the spatial facts between shapes that training shows together."""
    keys = [
        ("fact", axis, a, b)
        for axis in ("left", "above")
        for a in SHAPES
        for b in SHAPES
        if a != b and ("pair", *sorted((a, b))) not in held_out_pairs()
    ]
    return _lowest(keys, round(HELD_OUT_FRACTION * len(keys)))


@lru_cache(maxsize=65536)
def is_held_out(key: Combination) -> bool:
    """Whether this combination is held out: training never shows or names it."""
    kind = key[0]
    if kind == "colour":
        return key in held_out_colours()
    if kind == "pair":
        return key in held_out_pairs()
    if kind == "fact":
        return key in held_out_facts()
    return stable_hash(key) < (HELD_OUT_SENTENCES if kind == "sentence" else HELD_OUT_FRACTION)
