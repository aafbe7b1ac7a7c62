"""The committed reward models: they load, differentiate correctly, score rows independently and know the domain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.make_shapes.rewards_damage import KINDS, damage
from benchmarks.make_shapes.rewards_data import false_claim, make_batch, say
from benchmarks.make_shapes.rewards_report import as_images
from flowbp_ray.rewards import base, build
from flowbp_ray.rewards.shapes_clip import WEIGHTS, ShapesClip
from flowbp_ray.shapes.combinations import is_held_out
from flowbp_ray.shapes.look import Look
from flowbp_ray.shapes.render import render
from flowbp_ray.shapes.sampling import sample
from flowbp_ray.shapes.verifier import satisfies, verify
from flowbp_ray.shapes.world import SKILLS, scene_combinations

NAMES = ["shapes_clip", "shapes_clip_heldout"]
PREFERENCES = ["shapes_preference", "shapes_preference_heldout"]


@pytest.fixture(scope="module", params=NAMES)
def reward(request: pytest.FixtureRequest) -> ShapesClip:
    found = build(request.param)
    assert isinstance(found, ShapesClip)
    return found


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[str], list[str]]:
    """240 fresh held-out scenes, their captions and one hard negative each."""
    rng = np.random.default_rng(4711)
    rows = [sample(rng, "heldout", SKILLS[i % len(SKILLS)]) for i in range(240)]
    images = as_images([render(scene) for scene, _ in rows])
    wrong = [say(rng, false_claim(rng, prompt.claim, scene, True), True) for scene, prompt in rows]
    return images, [prompt.text for _, prompt in rows], wrong


def test_gradient_equals_finite_differences_in_fp64() -> None:
    for name in (*NAMES, *PREFERENCES):
        reward = build(name, dtype="float64")
        rng = np.random.default_rng(0)
        scene, prompt = sample(rng, "train")
        image = as_images([render(scene)]).double().requires_grad_(True)
        reward.score(image, [prompt.text]).sum().backward()
        assert image.grad is not None
        for _ in range(3):
            way = torch.from_numpy(rng.standard_normal(image.shape))
            step = 1e-5 * way
            with torch.no_grad():
                ahead, behind = reward.score(image + step, [prompt.text]), reward.score(image - step, [prompt.text])
            assert (image.grad * way).sum().item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-5)


def test_a_row_is_scored_alone(reward: ShapesClip, scenes: tuple[Tensor, list[str], list[str]]) -> None:
    images, texts, _ = scenes
    with torch.no_grad():
        together = reward.score(images[:12], texts[:12])
        alone = torch.cat([build(reward.name).score(images[i : i + 1], texts[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_right_caption_beats_a_hard_negative(reward: ShapesClip, scenes: tuple[Tensor, list[str], list[str]]) -> None:
    images, texts, wrong = scenes
    with torch.no_grad():
        true, false = reward.score(images, texts), reward.score(images, wrong)
    # The card beside the weights says 0.963 and 0.981 per skill; this is one draw of scenes.
    assert (true > false).float().mean() >= 0.93
    assert 0.6 < true.mean() < 1.3 and -0.3 < false.mean() < 0.5  # the calibration puts them near 1 and 0


def test_whole_pictures_beat_damaged_ones(reward: ShapesClip) -> None:
    rng = np.random.default_rng(12)
    good, bad, texts = [], [], []
    while len(texts) < 120:
        scene, prompt = sample(rng, "heldout")
        spoiled = damage(rng, scene, list(KINDS)[len(texts) % len(KINDS)])
        if not verify(spoiled, prompt):
            good.append(render(scene))
            bad.append(spoiled)
            texts.append(prompt.text)
    with torch.no_grad():
        won = reward.score(as_images(good), texts) > reward.score(as_images(bad), texts)
    assert won.float().mean() >= 0.85


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_for_right_content_and_good_drawing(name: str) -> None:
    """Fresh held-out scenes: clean above spoiled with the same caption, and above the same picture's false caption."""
    rng, reward = np.random.default_rng(61), build(name)
    rows = [sample(rng, "heldout", SKILLS[i % len(SKILLS)]) for i in range(120)]
    texts = [prompt.text for _, prompt in rows]
    wrong = [say(rng, false_claim(rng, prompt.claim, scene, True), True) for scene, prompt in rows]
    clean = as_images([render(scene) for scene, _ in rows])
    spoiled = as_images([render(scene, Look(1.1, 0.45, 0.5, 9.0, i)) for i, (scene, _) in enumerate(rows)])
    with torch.no_grad():
        best = reward.score(clean, texts)
        assert (best > reward.score(spoiled, texts)).float().mean() >= 0.9
        assert (best > reward.score(clean, wrong)).float().mean() >= 0.85


def test_fits_the_budget() -> None:
    assert sum((WEIGHTS / n / "model.safetensors").stat().st_size for n in (*NAMES, *PREFERENCES)) <= 7_000_000


def test_words_outside_the_grammar_are_refused(reward: ShapesClip) -> None:
    with pytest.raises(ValueError, match=r"do not know \['dog'\]"):
        reward.score(torch.zeros(1, 3, 64, 64), ["a dog"])
    with pytest.raises(ValueError, match="2 images need 2 prompts"):
        reward.score(torch.zeros(2, 3, 64, 64), ["a star"])


def test_missing_weights_say_how_to_make_them() -> None:
    with pytest.raises(ValueError, match=r"options\.folder is 'no/such/folder', which does not exist.*make_shapes"):
        ShapesClip(folder="no/such/folder")
    for options, message in (
        ({"folder": "no/such/folder"}, r"benchmarks\.make_shapes"),
        ({"folder": 5}, r"options\.folder must be a path, got 5"),
        ({"dtype": "foo"}, "options.dtype must be one of float32"),
        ({"name": "x"}, "it takes folder, device, dtype"),
    ):
        for name in ("shapes_clip", "shapes_clip_heldout"):
            with pytest.raises(ValueError, match=message):
                base.check(name, options)
    base.check("shapes_clip_heldout", {})


def test_training_batches_show_nothing_held_out_and_tell_the_truth() -> None:
    batch = make_batch(np.random.default_rng(5), pairs=20, damaged=10, wrong=3)
    assert batch.images.shape == (50, 64, 64, 3) and batch.truth.shape == (50, 40)
    assert batch.truth[:40].diagonal().all()
    assert not any(is_held_out(key) for scene in batch.scenes for key in scene_combinations(scene))
    rng = np.random.default_rng(6)
    for _ in range(50):
        scene, prompt = sample(rng, "train")
        assert not satisfies(scene, false_claim(rng, prompt.claim, scene))
