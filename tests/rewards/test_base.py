"""What can be wrong with a reward's name and options, each in one line and before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.rewards import base
from flowbp_ray.rewards.scorer import check_rewards


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math:pi", "pi in math is a float, not a class to build"),
        ("math:", "write package.module:Class"),
        (":x", "write package.module:Class"),
        (".a:x", "write package.module:Class"),
        ("math:nothing", "there is no 'nothing' in math"),
        ("no_such_package:x", "needs the package 'no_such_package'"),
        ("spoiled_reward:x", "importing spoiled_reward raises ZeroDivisionError"),
        ("unreadable_reward:x", "importing unreadable_reward raises SyntaxError"),
    ],
)
def test_a_module_that_is_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "spoiled_reward.py").write_text("1 / 0\n")
    (tmp_path / "unreadable_reward.py").write_text("def\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        base.check(name, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": 5}, r"options\.path must be a path, got 5"),
        ({"path": ["a"]}, r"options\.path must be a path, got \['a'\]"),
        ({"path": "a" * 5000}, "which does not exist"),
        ({"path": "~nosuchuser/x"}, "which does not exist"),
        ({"path": "a\0b"}, "which does not exist"),
    ],
)
def test_a_path_that_is_none_is_a_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        base.check("hpsv2", options)


@pytest.mark.parametrize("dtype", [[1], None, 32, "float16"])
def test_a_dtype_that_is_none_is_a_message(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"options\.dtype must be one of float32, bfloat16, float64, got"):
        base.check("shapes_clip", {"dtype": dtype})


class Anywhere:
    """A reward that does not say where it computes."""

    name = "anywhere"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.strength * images.mean((1, 2, 3))


class Somewhere(Anywhere):
    """One that passes what it is given on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(options["strength"])


def test_on_a_gpu_a_reward_must_take_a_device() -> None:
    """Before anything starts: `build` gives it one there."""
    terms = [{"name": "own", "kind": f"{__name__}:Anywhere", "options": {"strength": 2.0}}]
    check_rewards(RewardsConfig.model_validate({"terms": terms}))
    with pytest.raises(ValueError, match=r"takes no `device`, .* or write rewards\.gpus=0") as caught:
        check_rewards(RewardsConfig.model_validate({"terms": terms, "gpus": 1}))
    assert "\n" not in str(caught.value) and "rewards.gpus" in str(caught.value)
    base.check(f"{__name__}:Somewhere", {"strength": 2.0}, "cuda")
    base.build(f"{__name__}:Somewhere", "cuda", strength=2.0)
