"""The tutorials' Python does what their text says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowbp_ray.config import loading
from flowbp_ray.rewards import base
from tests.docs.pages import blocks

PAGE = "own-reward.md"
PYTHON = [block.text for block in blocks("python") if block.page.name == PAGE]


@pytest.fixture
def tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a reader who saved the classes as my_rewards.py and each YAML block by its run's name."""
    (tmp_path / "my_rewards.py").write_text("\n".join(text for text in PYTHON if text.startswith("class ")))
    for block in (block for block in blocks("yaml") if block.page.name == PAGE):
        (tmp_path / f"{yaml.safe_load(block.text)['name']}.yaml").write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def test_the_blocks_run_one_after_the_other() -> None:
    names: dict[str, Any] = {}
    for text in PYTHON:
        exec(compile(text, PAGE, "exec"), names)
    dark = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    assert names["MostlyDark"]().score(dark, ["a", "b"]).tolist() == [1.0, 0.0]


def test_the_configurations_name_rewards_that_are_there(tutorial: Path) -> None:
    bright, dark = (loading.load(tutorial / f"{name}.yaml") for name in ("bright", "dark"))
    for config in (bright, dark):
        for reward in config.rewards.all:
            base.check(reward.factory, reward.options)
    base.check_trainable(bright.rewards.terms[0].factory)
    with pytest.raises(ValueError, match="has no gradient"):
        base.check_trainable(dark.rewards.terms[0].factory)
    with pytest.raises(ValueError, match=r"options\.wanted must be in 0\.\.1"):
        base.check("my_rewards:Bright", {"wanted": 3})
