"""The world: what training shows, what is held out, and that both are reproducible."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from flowbp_ray.shapes import SHAPES, SKILLS, Prompt, load_prompts, render, sample, sample_prompt, satisfies
from flowbp_ray.shapes.captions import MAX_WORDS, WORDS, captions
from flowbp_ray.shapes.combinations import COLOURS, held_out_colours, held_out_facts, held_out_pairs, is_held_out
from flowbp_ray.shapes.sampling import HELD_OUT_KIND, claim_combinations, sample_scene
from flowbp_ray.shapes.world import GAP, holds, scene_combinations


def draw(split: str, count: int, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    return [sample(rng, split) for _ in range(count)]


def test_training_never_shows_or_names_a_held_out_combination() -> None:
    for scene, prompt in draw("train", 2000):
        assert not [key for key in scene_combinations(scene) if is_held_out(key)], scene
        assert not [key for key in claim_combinations(prompt) if is_held_out(key)], prompt


def test_held_out_prompts_name_exactly_one_novelty_of_their_skill() -> None:
    for scene, prompt in draw("heldout", 600):
        novel = [key for key in claim_combinations(prompt) if is_held_out(key)]
        assert [key[0] for key in novel] == [HELD_OUT_KIND[prompt.skill]]
        assert satisfies(scene, prompt.claim)
        shown = {key for key in novel if key[0] != "sentence"}
        assert shown <= scene_combinations(scene)


def test_the_held_out_choice_is_stable() -> None:
    """These words decide what the committed models have never seen: they may not change."""
    assert held_out_pairs() == {("pair", "cross", "square"), ("pair", "ring", "triangle"), ("pair", "circle", "star")}
    assert {key[1:] for key in held_out_colours()} == {
        ("circle", "black"), ("circle", "purple"), ("ring", "blue"), ("ring", "purple"), ("square", "green"),
        ("square", "orange"), ("star", "blue"), ("star", "orange"), ("triangle", "cyan"), ("triangle", "green"),
    }  # fmt: skip
    assert len(held_out_facts()) == 10
    assert all(("pair", *sorted(key[2:])) not in held_out_pairs() for key in held_out_facts())


def test_every_shape_and_colour_is_well_known_to_training() -> None:
    things = Counter((t.shape, t.colour) for scene, _ in draw("train", 3000) for t in scene.things)
    assert set(things) == {(s, c) for s in SHAPES for c in COLOURS} - {key[1:] for key in held_out_colours()}
    assert min(things.values()) > 40


def test_things_keep_apart_and_inside() -> None:
    for scene, _ in draw("train", 500):
        for i, a in enumerate(scene.things):
            assert all(2 <= value <= 62 for value in (a.x - a.size, a.x + a.size, a.y - a.size, a.y + a.size))
            for b in scene.things[i + 1 :]:
                assert np.hypot(a.x - b.x, a.y - b.y) >= a.size + b.size + GAP - 1e-9


def test_same_seed_same_pictures() -> None:
    first, second = draw("train", 40, seed=7), draw("train", 40, seed=7)
    assert first == second
    for (scene, _), (again, _) in zip(first, second, strict=True):
        image = render(scene)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert np.array_equal(image, render(again))


def test_relations_mirror() -> None:
    for scene, prompt in draw("train", 400):
        if prompt.skill == "position":
            a, b = scene.things
            assert holds("left of", a, b) == holds("right of", b, a)
            assert holds("above", a, b) == holds("below", b, a)
            assert not (holds("left of", a, b) and holds("right of", a, b))


def test_prompt_files() -> None:
    files = {split: load_prompts(split) for split in ("train", "dev", "heldout")}
    texts = {split: {p.text for p in prompts} for split, prompts in files.items()}
    assert len(texts["train"]) == len(files["train"]) >= 2000
    for split in ("dev", "heldout"):
        assert len(texts[split]) == 360
        assert Counter(p.skill for p in files[split]) == dict.fromkeys(SKILLS, 60)
    assert not texts["train"] & texts["dev"]
    assert not texts["train"] & texts["heldout"]
    assert not texts["dev"] & texts["heldout"]
    for split, prompts in files.items():
        for prompt in prompts:
            assert any(is_held_out(key) for key in claim_combinations(prompt)) == (split != "train"), prompt
            assert prompt.text in captions(prompt.claim)
            assert Prompt.from_json(prompt.to_json()) == prompt
            words = prompt.text.split()
            assert len(words) <= MAX_WORDS and set(words) <= set(WORDS)


def test_held_out_prompts_can_be_drawn_as_scenes() -> None:
    rng = np.random.default_rng(3)
    for prompt in load_prompts("heldout")[::6]:
        assert satisfies(sample_scene(rng, prompt.claim, "heldout"), prompt.claim)


def test_bad_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be"):
        sample_prompt(np.random.default_rng(0), "test")
    with pytest.raises(ValueError, match="split must be one of train, dev, heldout"):
        load_prompts("valid")
