"""docs/rewards.md: its example runs as printed, and its table names what there is."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from flowbp_ray.config.schema import RewardsConfig
from flowbp_ray.rewards import REWARDS, base, score_and_cotangent
from flowbp_ray.rewards.objective import RewardTerm
from tests.paths import ROOT

DOCS = ROOT / "docs" / "rewards.md"
NAME = "rewards_of_the_docs:MeanColour"
PACKAGED = {"ocr", "shapes_clip", "shapes_clip_heldout", "shapes_detector", "shapes_verifier"}
"""Those whose weights come with a package."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one python block of the page as a module of its own."""
    (source,) = blocks("python")
    (tmp_path / "rewards_of_the_docs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("rewards_of_the_docs", None)


def test_the_example_is_about_twenty_lines() -> None:
    (source,) = blocks("python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 20


def test_the_example_scores_by_hand() -> None:
    """A red picture asked to be red is at its best; asked to be blue it is (1, 0, 1) away: 2 · (1 + 1)."""
    reward = base.build(NAME, strength=2.0)
    red = torch.zeros(2, 3, 4, 4)
    red[:, 0] = 1.0
    assert reward.score(red, ["a red star", "a blue star"]).tolist() == [0.0, -4.0]
    with pytest.raises(ValueError, match="no colour that it knows in 'a star'"):
        reward.score(red, ["a red star", "a star"])


def test_its_gradient_is_that_of_finite_differences() -> None:
    reward = base.build(NAME, strength=0.7)
    images = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = ["red", "a green ring", "blue"]
    assert torch.autograd.gradcheck(lambda x: reward.score(x, prompts), images.requires_grad_(True))


def test_its_rows_are_independent() -> None:
    reward = base.build(NAME)
    images, prompts = torch.rand(3, 3, 4, 5), ["red", "green", "blue"]
    alone = [reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(3)]
    assert torch.equal(reward.score(images, prompts), torch.cat(alone))


def test_the_objective_takes_it_and_ascends() -> None:
    """A small step against the cotangent lowers the loss of all rows."""
    reward, term = base.build(NAME), RewardTerm("colour", clip=0.0)
    target = torch.rand(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    prompts = ["red", "green", "blue"]

    def loss(z: torch.Tensor) -> tuple[float, torch.Tensor]:
        result = score_and_cotangent(z, lambda x: x, [(term, reward)], prompts, torch.ones(3), global_batch=3)
        return result.losses.sum().item(), result.cotangent

    before, cotangent = loss(target)
    assert loss(target - 0.1 * cotangent)[0] < before


def test_its_options_are_checked_before_anything_starts() -> None:
    base.check(NAME, {"strength": 2.0})
    base.check_trainable(NAME)
    with pytest.raises(ValueError, match=r"options\.strength must be above 0, got -1"):
        base.check(NAME, {"strength": -1})
    with pytest.raises(ValueError, match="it takes strength, device"):
        base.check(NAME, {"colour": "red"})


def test_the_yaml_on_the_page_is_read() -> None:
    found = [part for part in map(yaml.safe_load, blocks("yaml")) if "rewards" in part]
    first, soft, ocr, several, own = (RewardsConfig(**part["rewards"]) for part in found)
    assert [reward.factory for reward in first.all] == ["pickscore", "geneval", "hpsv2"]
    assert [reward.factory for reward in soft.all] == ["soft_geneval", "geneval"]
    assert [reward.factory for reward in ocr.monitors] == ["ocr"]
    assert [reward.factory for reward in several.all] == ["hpsv2", "pickscore", "aesthetic"]
    assert own.terms[0].factory == "my_rewards:MeanColour" and own.terms[0].options == {"strength": 2.0}


def test_every_registered_reward_has_a_row() -> None:
    """A held-out variant shares the row of its sibling."""
    rows = set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), flags=re.MULTILINE))
    missing = {name for name in REWARDS if name not in rows and name.removesuffix("_heldout") not in rows}
    assert not missing


@pytest.mark.parametrize("name", sorted(name for name in REWARDS if name not in PACKAGED))
def test_a_row_names_every_file_that_its_reward_may_need(name: str) -> None:
    """Those are the options without a default: a path, or nothing."""
    (row,) = re.findall(rf"^\| `{name}` \|.*$", DOCS.read_text(), flags=re.MULTILINE)
    parameters = inspect.signature(base.factory(name)).parameters.values()
    files = [p.name for p in parameters if p.default is None and "Path" in str(p.annotation)]
    assert files and not [file for file in files if f"→ `{file}`" not in row]
