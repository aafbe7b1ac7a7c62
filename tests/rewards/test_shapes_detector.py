"""The detector reward: its rule against sums over all pictures, its gradient, and what it tells apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.make_shapes.rewards_report import as_images
from flowbp_ray.rewards import base, build
from flowbp_ray.rewards.shapes_claims import SLACK, SURPLUS, agreement, things
from flowbp_ray.rewards.shapes_clip import WEIGHTS
from flowbp_ray.rewards.shapes_detector import ShapesDetector
from flowbp_ray.rewards.shapes_maps import JUNK, KINDS, NOTHING, Maps
from flowbp_ray.rewards.skeleton import skeleton
from flowbp_ray.shapes.captions import captions
from flowbp_ray.shapes.combinations import COLOURS, SHAPES
from flowbp_ray.shapes.look import sample_look
from flowbp_ray.shapes.render import render
from flowbp_ray.shapes.sampling import sample
from flowbp_ray.shapes.verifier import satisfies
from flowbp_ray.shapes.world import RELATIONS, SKILLS, Claim, Part

HUES = list(COLOURS)


def maps_of(kinds: Tensor, colours: Tensor, large: Tensor, places: Tensor) -> Maps:
    return Maps(F.log_softmax(kinds, -1), F.log_softmax(colours, -1), large, places)


def random_maps(cells: int, seed: int = 0) -> Maps:
    rng = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(1, cells, width, generator=rng, dtype=torch.float64) for width in (8, 8, 1, 2)]
    return maps_of(drawn[0], drawn[1], drawn[2][..., 0], 32 + 12 * drawn[3])


def clear_maps(seen: list[tuple[str, str, bool, float, float]], cells: int = 9) -> Maps:
    """Maps without doubt: (kind, colour, large, x, y) in the first cells, nothing in the others."""
    kinds, colours = torch.full((1, cells, 8), -30.0), torch.full((1, cells, 8), -30.0)
    large, places = torch.zeros(1, cells), torch.full((1, cells, 2), 32.0)
    kinds[..., NOTHING] = 0.0
    for i, (kind, colour, big, x, y) in enumerate(seen):
        kinds[0, i, NOTHING], kinds[0, i, KINDS.index(kind)] = -30.0, 0.0
        colours[0, i, HUES.index(colour)] = 0.0
        large[0, i], places[0, i] = (30.0 if big else -30.0), torch.tensor([x, y])
    return maps_of(kinds, colours, large, places)


def fits(state: tuple[int, int, int], part: Part) -> bool:
    kind, colour, large = state
    if KINDS[kind] != part.shape or (part.colour is not None and HUES[colour] != part.colour):
        return False
    return part.size is None or large == (part.size == "large")


def beside(first: Tensor, second: Tensor, relation: str) -> float:
    dx, dy = (second - first).tolist()
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return 1 / (1 + math.exp(-(along - 0.5 * math.sqrt(dx * dx + dy * dy + 1)) / SLACK))


def by_enumeration(maps: Maps, claim: Claim) -> float:
    """The score with its expectations summed over every picture that two or three cells can hold."""
    cells = maps.kinds.shape[1]
    states = list(product(range(8), range(8), (0, 1)))
    kinds, colours, large = maps.kinds[0].exp(), maps.colours[0].exp(), maps.large[0].sigmoid()
    size = torch.stack([1 - large, large], -1)
    chance = torch.stack([kinds[:, k] * colours[:, c] * size[:, s] for k, c, s in states], -1).tolist()
    found, count = [0.0] * len(claim.parts), 0.0
    pairs = 0.0
    for picture in product(range(len(states)), repeat=cells):
        weight = math.prod(chance[cell][state] for cell, state in enumerate(picture))
        shown = [states[state] for state in picture]
        count += weight * sum(state[0] != NOTHING for state in shown)
        held = [[fits(state, part) for state in shown] for part in claim.parts]
        for index, each in enumerate(held):
            found[index] += weight * sum(each)
        if claim.relation is not None:
            for i, j in product(range(cells), repeat=2):
                if i != j and held[0][i] and held[1][j]:
                    pairs += weight * beside(maps.places[0, i], maps.places[0, j], claim.relation)
    wanted = sum(part.count for part in claim.parts)
    surplus = abs(count - wanted)
    penalty = 0.5 * surplus**2 if surplus < 1 else surplus - 0.5
    if claim.relation is not None:
        return math.log(min(pairs, 1.0)) - SURPLUS * penalty
    matched = sum(p.count * math.log(min(e, p.count) / p.count) for e, p in zip(found, claim.parts, strict=True))
    return matched - SURPLUS * penalty


@pytest.mark.parametrize(
    "claim",
    [
        Claim((Part("star", size="small"),)),
        Claim((Part("ring", 3, "red"),)),
        Claim((Part("ring", colour="red"), Part("star", colour="blue"))),
        Claim((Part("ring"), Part("star", colour="cyan")), "left of"),
        Claim((Part("cross", colour="black"), Part("circle")), "below"),
    ],
)
def test_the_score_is_the_sum_over_all_pictures(claim: Claim) -> None:
    maps = random_maps(2, seed=len(str(claim)))
    assert agreement(maps, claim).item() == pytest.approx(by_enumeration(maps, claim), rel=1e-9)


def test_what_is_claimed_and_nothing_else_scores_zero() -> None:
    seen = [("ring", "red", True, 12.0, 30.0), ("star", "blue", False, 50.0, 30.0)]
    claim = Claim((Part("ring", colour="red"), Part("star", colour="blue")))
    assert agreement(clear_maps(seen), claim).item() == pytest.approx(0.0, abs=1e-4)
    assert agreement(clear_maps(seen), replace(claim, relation="left of")).item() == pytest.approx(0.0, abs=1e-4)
    for wrong in ("right of", "above", "below"):
        assert agreement(clear_maps(seen), replace(claim, relation=wrong)).item() < -5
    more = [*seen, ("junk", "red", False, 30.0, 50.0)]
    assert agreement(clear_maps(more), claim).item() == pytest.approx(-SURPLUS / 2, abs=1e-3)
    assert KINDS[JUNK] == "junk" and things(clear_maps(more)).item() == pytest.approx(3.0)


def test_a_thing_between_two_cells_is_one_thing() -> None:
    whole = clear_maps([("ring", "red", True, 16.0, 30.0)])
    kinds = whole.kinds.clone()
    for cell in (0, 1):
        kinds[0, cell] = -30.0
        kinds[0, cell, NOTHING] = kinds[0, cell, KINDS.index("ring")] = math.log(0.5)
    colours = whole.colours.clone()
    colours[0, 1] = colours[0, 0]
    claim = Claim((Part("ring", colour="red"),))
    assert agreement(replace(whole, kinds=kinds, colours=colours), claim).item() == pytest.approx(0.0, abs=1e-4)


def test_gradients_are_finite_wherever_the_maps_are() -> None:
    claim = Claim((Part("ring", colour="red"), Part("star", colour="blue")), "above")
    for strength in (0.0, 1e2, 1e4):
        rng = torch.Generator().manual_seed(3)
        raw = [(strength * torch.randn(1, 9, w, generator=rng)).requires_grad_() for w in (8, 8, 1)]
        places = torch.full((1, 9, 2), 7.0, requires_grad=True)
        score = agreement(maps_of(raw[0], raw[1], raw[2][..., 0], places), claim)
        gradients = torch.autograd.grad(score.sum(), [raw[0], raw[1], places])
        assert torch.isfinite(score).all() and all(torch.isfinite(g).all() for g in gradients)


def test_gradient_equals_finite_differences_in_fp64() -> None:
    reward, rng = build("shapes_detector", dtype="float64"), np.random.default_rng(0)
    for skill in SKILLS:
        scene, prompt = sample(rng, "heldout", skill)
        image = as_images([render(scene, sample_look(rng))]).double().requires_grad_(True)
        (gradient,) = torch.autograd.grad(reward.score(image, [prompt.text]).sum(), image)
        way = torch.from_numpy(rng.standard_normal(image.shape))
        with torch.no_grad():
            ahead, behind = (reward.score(image + s * way, [prompt.text]) for s in (1e-6, -1e-6))
        assert (gradient * way).sum().item() == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-4, abs=1e-7)


def single_changes(claim: Claim) -> Iterator[Claim]:
    """Every claim that differs in one word: a shape, colour, number, size or relation, or things that trade places."""
    for index, part in enumerate(claim.parts):
        others = [replace(part, shape=s) for s in SHAPES if s not in {p.shape for p in claim.parts}]
        if part.colour is not None:
            others += [replace(part, colour=c) for c in HUES if c != part.colour]
        if part.size is not None:
            others.append(replace(part, size="small" if part.size == "large" else "large"))
        if len(claim.parts) == 1:
            others += [replace(part, count=n) for n in (1, 2, 3, 4) if n != part.count]
        for other in others:
            yield replace(claim, parts=tuple(other if i == index else p for i, p in enumerate(claim.parts)))
    if len(claim.parts) == 2:
        a, b = claim.parts
        yield replace(claim, parts=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    if claim.relation is not None:
        for relation in RELATIONS:
            yield replace(claim, relation=relation)


def test_a_right_rendering_is_above_every_change_of_its_claim() -> None:
    """60 fresh scenes with held-out combinations, ten a skill, in any look."""
    reward, rng = ShapesDetector(), np.random.default_rng(77)
    above = 0
    for index in range(60):
        scene, prompt = sample(rng, "heldout", SKILLS[index % 6])
        wrong = [c for c in single_changes(prompt.claim) if not satisfies(scene, c)]
        assert wrong
        with torch.no_grad():
            maps = reward.model(as_images([render(scene, sample_look(rng))]))
        own = agreement(maps, prompt.claim).item()
        above += own > max(agreement(maps, claim).item() for claim in wrong)
    assert above >= 54


def test_a_row_is_scored_alone_between_wrong_and_right() -> None:
    reward, rng = ShapesDetector(), np.random.default_rng(8)
    rows = [sample(rng, "heldout", SKILLS[i % 6]) for i in range(36)]
    images = as_images([render(scene, sample_look(rng)) for scene, _ in rows])
    texts = [prompt.text for _, prompt in rows]
    with torch.no_grad():
        together = reward.score(images, texts)
        alone = torch.cat([reward.score(images[i : i + 1], texts[i : i + 1]) for i in range(6)])
        other = reward.score(images, texts[1:] + texts[:1])  # prompts of another skill
    torch.testing.assert_close(together[:6], alone, rtol=1e-4, atol=1e-4)
    assert together.dtype == torch.float32
    assert 0.6 < together.mean() < 1.4 and other.mean() < 0.3


def test_plans_know_its_size() -> None:
    known, reward = skeleton("shapes_detector", {}), ShapesDetector()
    assert known is not None and known.see is not None
    assert known.nbytes == sum(4 * p.numel() for p in reward.model.parameters())
    assert known.see(known.module, torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 64, 8)


def test_fits_the_budget() -> None:
    assert (WEIGHTS / "shapes_detector" / "model.safetensors").stat().st_size <= 1_300_000


def test_what_it_cannot_judge_is_refused() -> None:
    reward = ShapesDetector()
    with pytest.raises(ValueError, match="'a dog' is no sentence of the shapes grammar"):
        reward.score(torch.zeros(1, 3, 64, 64), ["a dog"])
    with pytest.raises(ValueError, match="2 images need 2 prompts"):
        reward.score(torch.zeros(2, 3, 64, 64), ["a star"])
    with pytest.raises(ValueError, match=r"images \[B, 3, 64, 64\], got \[1, 3, 32, 32\]"):
        reward.score(torch.zeros(1, 3, 32, 32), ["a star"])
    base.check("shapes_detector", {})
    base.check_trainable("shapes_detector")
    base.check_prompts("shapes_detector", {}, [captions(Claim((Part("star", 2),)))[0]])
    with pytest.raises(ValueError, match="no sentence of the shapes grammar"):
        base.check_prompts("shapes_detector", {}, ["a red cat"])
    for options, message in (
        ({"folder": "no/such/folder"}, r"'shapes_detector': options\.folder is 'no/such/folder'.*make_shapes"),
        ({"folder": str(WEIGHTS)}, "no model.safetensors in|no config.json in"),
        ({"dtype": "foo"}, "options.dtype must be one of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            base.check("shapes_detector", options)
