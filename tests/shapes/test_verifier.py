"""The verifier against the renderer: it knows the truth, and refuses everything else."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage

from flowbp_ray.shapes import (
    COLOURS,
    SHAPES,
    Claim,
    Part,
    Prompt,
    Scene,
    Thing,
    colour_entropy,
    read,
    render,
    sample,
    sample_prompt,
    satisfies,
    verify,
)
from flowbp_ray.shapes.verifier import UNKNOWN

WHITE = (236, 238, 232)
STAR = Thing("star", "red", 22.0, 24.0, 12.0)
RING = Thing("ring", "blue", 46.0, 44.0, 11.0)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def world() -> list[tuple[Scene, Prompt, np.ndarray]]:
    rng = np.random.default_rng(17)
    pairs = [sample(rng, "train" if i % 2 else "heldout") for i in range(2000)]
    return [(scene, prompt, render(scene)) for scene, prompt in pairs]


def near_misses(prompt: Prompt) -> list[Claim]:
    """Claims that differ from the prompt's in one word."""
    claim, first = prompt.claim, prompt.claim.parts[0]
    change = [dataclasses.replace(first, shape=SHAPES[(SHAPES.index(first.shape) + 1) % 6])]
    change.append(dataclasses.replace(first, count=first.count + 1))
    if first.colour:
        names = list(COLOURS)
        change.append(dataclasses.replace(first, colour=names[(names.index(first.colour) + 1) % 8]))
    if first.size:
        change.append(dataclasses.replace(first, size="small" if first.size == "large" else "large"))
    wrong = [Claim((part, *claim.parts[1:]), claim.relation) for part in change]
    if claim.relation:
        wrong.append(Claim(claim.parts, OPPOSITE[claim.relation]))
    return wrong


def test_truth_is_accepted(world: list) -> None:
    passed = [verify(image, prompt) for _, prompt, image in world]
    assert np.mean(passed) >= 0.995


def test_reading_gives_the_scene_back(world: list) -> None:
    for scene, _, image in world[:300]:
        found = read(image)
        assert found is not None and len(found.things) == len(scene.things)
        for thing in scene.things:
            near = min(found.things, key=lambda other: math.hypot(other.x - thing.x, other.y - thing.y))
            assert (near.shape, near.colour) == (thing.shape, thing.colour)
            assert max(abs(near.x - thing.x), abs(near.y - thing.y), abs(near.size - thing.size)) < 0.5


def test_wrong_captions_are_refused(world: list) -> None:
    """Random captions of the same skill and captions that are off by one word."""
    rng = np.random.default_rng(18)
    answers: list[bool] = []
    for scene, prompt, image in world[:800]:
        claims = [sample_prompt(rng, "train", prompt.skill).claim, *near_misses(prompt)]
        answers += [verify(image, claim) for claim in claims if not satisfies(scene, claim)]
    assert len(answers) > 2000
    assert np.mean(answers) <= 0.01


def test_an_extra_object_fails() -> None:
    claim = Claim((Part("star", colour="red"),))
    assert verify(render(Scene((STAR,), WHITE)), claim)
    assert not verify(render(Scene((STAR, RING), WHITE)), claim)
    ghost = render(Scene((STAR,), WHITE)).astype(float)
    ghost[40:50, 40:50] += 0.4 * (np.array(COLOURS["blue"]) - ghost[40:50, 40:50])
    assert not verify(ghost.astype(np.uint8), claim)
    blob = render(Scene((STAR,), WHITE))
    blob[40:44, 40:44] = 128
    assert not verify(blob, claim)


def test_things_that_are_no_clear_shape_or_colour_are_unknown() -> None:
    image = render(Scene((dataclasses.replace(RING, shape="square"),), WHITE))
    image[:, 46:] = np.where((image[:, 46:] < 200).any(-1, keepdims=True), COLOURS["red"], image[:, 46:])
    found = read(image)
    assert found is not None and [thing.colour for thing in found.things] == [UNKNOWN]
    bar = np.full((64, 64, 3), 235, np.uint8)
    bar[30:34, 8:56] = COLOURS["green"]
    found = read(bar)
    assert found is not None and [thing.shape for thing in found.things] == [UNKNOWN]


def test_no_background_no_reading() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image in (np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), (40, 70, 220), np.uint8), noise):
        assert read(image) is None
        assert not verify(image, Claim((Part("star"),)))


def test_an_empty_picture_shows_nothing() -> None:
    empty = np.full((64, 64, 3), WHITE, np.uint8)
    found = read(empty)
    assert found is not None and found.things == ()
    assert not verify(empty, Claim((Part("star"),)))


def test_a_little_blur_is_tolerated(world: list) -> None:
    passed = []
    for _, prompt, image in world[:300]:
        soft = ndimage.gaussian_filter(image.astype(float), (0.6, 0.6, 0)).round().astype(np.uint8)
        passed.append(verify(soft, prompt))
    assert np.mean(passed) >= 0.99


def test_relations_and_colours_belong_to_their_things() -> None:
    image = render(Scene((STAR, RING), WHITE))
    red_star, blue_ring = Part("star", colour="red"), Part("ring", colour="blue")
    assert verify(image, Claim((red_star, blue_ring), "left of"))
    assert verify(image, Claim((red_star, blue_ring), "above"))
    assert not verify(image, Claim((red_star, blue_ring), "right of"))
    assert not verify(image, Claim((blue_ring, red_star), "left of"))
    assert not verify(image, Claim((Part("star", colour="blue"), Part("ring", colour="red"))))


def test_colour_entropy() -> None:
    free = Prompt("a circle", "single_object", Claim((Part("circle"),)))
    stated = Prompt("a red circle", "colour", Claim((Part("circle", colour="red"),)))

    def disc(colour: str) -> np.ndarray:
        return render(Scene((Thing("circle", colour, 32.0, 32.0, 12.0),), WHITE))

    images = [disc(colour) for colour in COLOURS]
    assert colour_entropy(images, [free] * 8) == pytest.approx(3.0)
    assert colour_entropy([images[0]] * 4, [free] * 4) == pytest.approx(0.0)
    assert colour_entropy([images[0], images[1], images[0]], [free, free, stated]) == pytest.approx(1.0)
    assert math.isnan(colour_entropy(images, [stated] * 8))
