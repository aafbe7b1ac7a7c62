"""The base at a guidance of its own: the velocity that diffusers' pipelines take, and how many forwards it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones import tokens
from flowbp_ray.backbones.guidance import full_velocity, held_velocity, trained_velocity
from flowbp_ray.planning.work import based
from tests.backbones import tiny
from tests.backbones.families import Family, noise_of, relative, run_config
from tests.conftest import Saved

SIZE, STEPS, ROWS = (32, 48), 3, [0, 1]
PAIRS = [(1.0, 3.5), (2.0, 3.5), (2.0, 1.0), (3.5, 3.5), (1.0, 1.0)]
"""Guidance that is learned, and guidance of the base."""


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request: pytest.FixtureRequest, saved: Saved) -> Family:
    return Family.saved(request.param, saved)


def held(family: Family, learned: float, at: float, detach: bool = True) -> Any:
    cond, negative = family.embeddings.rows(ROWS), family.embeddings.negative(len(ROWS))
    sigmas = family.backbone.sigmas(STEPS, *SIZE)
    return held_velocity(family.backbone, family.transformer, sigmas, cond, negative, learned, detach, at)


def taken(family: Family, guidance: float, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(state, velocity) of each step of the family's pipeline, in our layout."""
    seen, step = [], family.pipe.scheduler.step
    side = family.backbone.pixels_per_token

    def ours(x: Tensor) -> Tensor:
        return x if family.name == "sd35" else tokens.unflatten(x, SIZE[0] // side, SIZE[1] // side)

    def recorded(v: Tensor, t: Tensor, x: Tensor, **more: Any) -> Any:
        seen.append((ours(x).clone(), ours(v).clone()))
        return step(v, t, x, **more)

    monkeypatch.setattr(family.pipe.scheduler, "step", recorded)
    family.call(*SIZE, guidance, STEPS, noise_of(family, *SIZE, len(ROWS)), ROWS, "latent")
    return seen


@torch.no_grad()
def test_a_run_without_guidance_is_held_to_what_the_pipeline_s_guidance_gives(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every state of a guided call of the pipeline; the unguided base is far from it."""
    found, row = taken(family, 3.5, monkeypatch), torch.arange(len(ROWS))
    assert len(found) == STEPS
    guided, plain = held(family, 1.0, 3.5), held(family, 1.0, 1.0)
    for i, (x, v) in enumerate(found):
        node = torch.full_like(row, i)
        assert relative(guided(x, node, row), v) <= 1e-5
        assert relative(plain(x, node, row), v) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("detach", [True, False])
def test_the_difference_is_that_of_guided_velocities_with_the_base_s_negative(family: Family, detach: bool) -> None:
    """What a learner of weights equal to the base's is away from it: v at guidance 2 minus v at guidance 3.5."""
    x, node, row = noise_of(family, *SIZE, 2), torch.tensor([0, 2]), torch.arange(2)
    cond, negative = family.embeddings.rows(ROWS), family.embeddings.negative(2)
    bound = (family.backbone, family.transformer, family.backbone.sigmas(STEPS, *SIZE), cond, negative)
    two, more = (full_velocity(*bound, g)(x, node, row) for g in (2.0, 3.5))
    away = trained_velocity(*bound, 2.0, detach)(x, node, row) - held(family, 2.0, 3.5, detach)(x, node, row)
    torch.testing.assert_close(away, two - more, rtol=1e-3, atol=1e-5)
    same = trained_velocity(*bound, 2.0, detach)(x, node, row)
    assert torch.equal(held(family, 2.0, 2.0, detach)(x, node, row), same)  # one guidance: bit for bit as before


@torch.no_grad()
@pytest.mark.parametrize("detach", [True, False])
def test_its_forwards_are_those_that_are_planned(family: Family, detach: bool, tmp_path: Path) -> None:
    x, node, row, seen = noise_of(family, *SIZE, 2), torch.tensor([0, 2]), torch.arange(2), []
    folder = family.backbone.base_folder
    hook = family.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for learned, at in PAIRS:
        seen.clear()
        held(family, learned, at, detach)(x, node, row)
        more = [f"backbone.guidance={learned}", f"backbone.detach_negative={str(detach).lower()}"]
        penalty = f"learners.base_penalty={{weight: 1, guidance: {at}}}"
        config = run_config(family.name, folder, tmp_path, "flowbp_bridge", *more, penalty)
        forwards, rows = based(config, family.backbone)
        assert seen == [2 * rows] * forwards, (learned, at)
    hook.remove()
