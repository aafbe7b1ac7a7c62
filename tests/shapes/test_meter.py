"""Looks and the quality meter: each fault lowers its own mark, more of it lowers it more, and content stays legible."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from flowbp_ray.shapes import CLEAN, Look, Scene, Thing, quality, render, sample, sample_look, verify
from flowbp_ray.shapes.look import GOOD_SHARE, WORST
from flowbp_ray.shapes.meter import EDGE

MARK = {"blur": "edges", "ragged": "edges", "fade": "colours", "stains": "background"}
GREY = (236, 238, 232)


def scenes(count: int, seed: int = 3) -> list:
    rng = np.random.default_rng(seed)
    return [sample(rng, "heldout" if i % 2 else "train") for i in range(count)]


def test_a_clean_rendering_has_full_marks() -> None:
    marks = [quality(render(scene)) for scene, _ in scenes(300)]
    assert min(min(m.edges, m.colours, m.background) for m in marks) == 1.0


@pytest.mark.parametrize("fault", WORST)
def test_a_fault_lowers_its_own_mark_and_more_of_it_lowers_it_more(fault: str) -> None:
    means = []
    for share in (0.0, 0.5, 1.0):
        looks = [Look(**{fault: share * WORST[fault]}, seed=i) for i in range(60)]
        marks = [quality(render(scene, look)) for (scene, _), look in zip(scenes(60), looks, strict=True)]
        means.append({f.name: np.mean([getattr(m, f.name) for m in marks]) for f in fields(marks[0])})
    own = [mean[MARK[fault]] for mean in means]
    assert own[0] == 1.0 > own[1] and own[1] > own[2] + 0.2
    assert all(means[2][other] > 0.85 for other in means[2] if other != MARK[fault])


def test_the_edge_error_is_the_distance_between_outlines() -> None:
    """A circle that is drawn by a second radius: the template of equal area fits, so only blur moves the outline.

    A Gaussian of standard deviation s makes the mean distance between a blurred and a sharp straight edge
    E|N(0, s)| = s * sqrt(2 / pi), less what the pixel's own width hides.
    """
    scene = Scene((Thing("circle", "black", 32.0, 32.0, 14.0),), GREY)
    low, high = EDGE
    for blur in (0.7, 0.85):
        mark = quality(render(scene, Look(blur=blur))).edges
        error = high - mark * (high - low)
        assert error == pytest.approx(np.hypot(blur, 12**-0.5) * np.sqrt(2 / np.pi) - 0.25, abs=0.09)


def test_content_is_legible_in_every_look() -> None:
    rng = np.random.default_rng(5)
    looks = [sample_look(rng) for _ in range(600)]
    right = [verify(render(scene, look), prompt) for (scene, prompt), look in zip(scenes(600), looks, strict=True)]
    assert np.mean(right) > 0.9
    assert np.mean([look == CLEAN for look in looks]) == pytest.approx(GOOD_SHARE, abs=0.06)
    assert all(0.4 * WORST[n] <= getattr(look, n) <= WORST[n] for look in looks for n in WORST if getattr(look, n))


def test_nothing_is_not_good() -> None:
    assert quality(np.full((64, 64, 3), 235, np.uint8)).mean == 0.0
    assert quality(np.zeros((64, 64, 3), np.uint8)).mean == 0.0


def test_a_look_repeats_its_bits() -> None:
    (scene, _), look = scenes(1)[0], Look(blur=0.5, fade=0.2, ragged=0.4, stains=6.0, seed=11)
    assert np.array_equal(render(scene, look), render(scene, look))
    assert not np.array_equal(render(scene, look), render(scene, Look(**{**look.__dict__, "seed": 12})))
    assert np.array_equal(render(scene), render(scene, CLEAN))
