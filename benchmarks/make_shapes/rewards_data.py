"""Batches for the reward models: minimal pairs of scenes, hard-negative captions, damaged pictures.

Everything is drawn from the training split: no scene and no caption here, wrong ones included, shows or names a
held-out combination.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.make_shapes.rewards_damage import damage
from flowbp_ray.shapes.captions import caption
from flowbp_ray.shapes.combinations import COLOURS, COUNTS, SHAPES, is_held_out
from flowbp_ray.shapes.render import render
from flowbp_ray.shapes.sampling import claim_combinations, sample, sample_scene
from flowbp_ray.shapes.verifier import satisfies, verify
from flowbp_ray.shapes.world import RELATIONS, SIZE_BOUNDARY, Claim, Part, Prompt, Scene, scene_combinations


@dataclass(frozen=True)
class Batch:
    """One training batch; rows below `clean` are true renderings of their caption, the rest are damaged pictures.

    images: uint8 [R, 64, 64, 3]. texts: R captions. wrong: [clean][n] captions that are false for the picture.
    truth: bool [R, clean], whether picture r shows what caption j states. own: bool [R], the same for its own caption.
    scenes: the scene behind each clean row. claims: what each clean row's caption and its wrong ones state, [clean]
    then [clean * n] in one list.
    """

    images: np.ndarray
    texts: list[str]
    wrong: list[list[str]]
    truth: np.ndarray
    own: np.ndarray
    scenes: list[Scene]
    claims: list[Claim]


def _other(rng: np.random.Generator, words: list[str], *not_these: str | None) -> str:
    return str(rng.choice([word for word in words if word not in not_these]))


def _change_part(rng: np.random.Generator, claim: Claim, index: int, scene: Scene) -> Claim:
    """The claim with one word of one part changed: colour, shape, number or size."""
    part = claim.parts[index]
    kind = rng.choice(["colour", "shape", "count", "size"], p=[0.4, 0.3, 0.2, 0.1])
    alone = len(claim.parts) == 1
    if kind == "size" and alone and part.count == 1 and part.colour is None:
        large = scene.things[0].size > SIZE_BOUNDARY
        new = replace(part, size="small" if large else "large")
    elif kind == "count" and alone:
        wrong = [n for n in (1, *COUNTS) if n != part.count]
        near = [n for n in wrong if abs(n - part.count) == 1]
        new = replace(part, count=int(rng.choice(near if rng.random() < 0.7 else wrong)), size=None)
    elif kind == "colour":
        shown = {t.colour for t in scene.things if t.shape == part.shape}
        elsewhere = [t.colour for t in scene.things if t.colour not in shown]
        wrong_colour = elsewhere[0] if elsewhere and rng.random() < 0.5 else _other(rng, list(COLOURS), *shown)
        new = replace(part, colour=wrong_colour, size=None)
    else:
        new = replace(part, shape=_other(rng, list(SHAPES), *(p.shape for p in claim.parts)))
    return replace(claim, parts=tuple(new if i == index else p for i, p in enumerate(claim.parts)))


def _mutate(rng: np.random.Generator, claim: Claim, scene: Scene) -> Claim:
    """A claim one step away from this one; it may still be true."""
    parts = claim.parts
    if len(parts) == 1:
        if rng.random() < 0.2 and parts[0].count <= 2:  # something more
            more = Part(_other(rng, list(SHAPES), parts[0].shape))
            return Claim((replace(parts[0], count=1, size=None), more))
        return _change_part(rng, claim, 0, scene)
    a, b = parts
    draw = rng.random()
    if claim.relation is not None and draw < 0.5:
        if draw < 0.2:
            return Claim((b, a), claim.relation)
        return Claim(parts, _other(rng, list(RELATIONS), claim.relation))
    if a.colour != b.colour and draw < 0.65:  # swap the binding
        return Claim((replace(a, colour=b.colour), replace(b, colour=a.colour)), claim.relation)
    if draw < 0.72:  # forget one
        return Claim((parts[rng.integers(2)],))
    if draw < 0.79:  # a relation that is wrong
        return Claim(parts, str(rng.choice(RELATIONS)))
    return _change_part(rng, claim, int(rng.integers(2)), scene)


def allowed(claim: Claim) -> bool:
    """Whether the claim names no held-out combination (sentences aside: they are checked on the caption)."""
    return not any(is_held_out(key) for key in claim_combinations(Prompt("", "", claim)))


def false_claim(rng: np.random.Generator, claim: Claim, scene: Scene, novel: bool = False) -> Claim:
    """A claim close to `claim` that is false for the scene; `novel` permits held-out combinations."""
    while True:
        other = _mutate(rng, claim, scene)
        if rng.random() < 0.15:
            other = _mutate(rng, other, scene)
        if not satisfies(scene, other) and (novel or allowed(other)):
            return other


def say(rng: np.random.Generator, claim: Claim, novel: bool = False) -> str:
    """A caption of the claim, none of the held-out sentences unless `novel`."""
    single = len(claim.parts) == 1 and claim.parts[0].count == 1 and claim.parts[0].colour is None
    while True:
        text = caption(rng, claim)
        if novel or not single or not is_held_out(("sentence", text)):
            return text


def twin(rng: np.random.Generator, scene: Scene, claim: Claim) -> tuple[Scene, Claim]:
    """A scene that differs from this one in what one changed word of the caption makes different, and its claim."""
    other = false_claim(rng, claim, scene)
    fresh = sample_scene(rng, other, "train")
    if len(fresh.things) != len(scene.things):
        return replace(fresh, background=scene.background), other
    for source in (scene.things, scene.things[::-1]):
        things = tuple(
            replace(new, x=old.x, y=old.y, size=old.size) for new, old in zip(fresh.things, source, strict=True)
        )
        candidate = Scene(things, scene.background)
        if satisfies(candidate, other) and not any(is_held_out(key) for key in scene_combinations(candidate)):
            return candidate, other
    return fresh, other


def make_batch(rng: np.random.Generator, pairs: int, damaged: int, wrong: int) -> Batch:
    """Draw 2 * pairs clean rows (each scene beside its twin) and `damaged` pictures of random ones among them."""
    scenes: list[Scene] = []
    claims: list[Claim] = []
    for _ in range(pairs):
        scene, prompt = sample(rng, "train")
        scenes.append(scene)
        claims.append(prompt.claim)
        other_scene, other_claim = twin(rng, scene, prompt.claim)
        scenes.append(other_scene)
        claims.append(other_claim)
    rows = [int(r) for r in rng.permutation(len(scenes))[:damaged]]
    spoiled = [damage(rng, scenes[r]) for r in rows]
    images = np.stack([*(render(scene) for scene in scenes), *spoiled])
    texts = [say(rng, claim) for claim in claims]
    lies = [
        [(lie, say(rng, lie)) for lie in (false_claim(rng, claim, scene) for _ in range(wrong))]
        for scene, claim in zip(scenes, claims, strict=True)
    ]
    clean_truth = np.array([[satisfies(scene, claim) for claim in claims] for scene in scenes])
    own = [verify(image, claims[r]) for image, r in zip(spoiled, rows, strict=True)]
    truth = np.concatenate([clean_truth, clean_truth[rows] & np.array(own, bool)[:, None]])
    return Batch(
        images=images,
        texts=[*texts, *(texts[r] for r in rows)],
        wrong=[[text for _, text in row] for row in lies],
        truth=truth,
        own=np.concatenate([np.ones(len(scenes), bool), np.array(own, bool)]),
        scenes=scenes,
        claims=[*claims, *(lie for row in lies for lie, _ in row)],
    )
