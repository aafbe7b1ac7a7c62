"""What can be wrong with a reward's name and options, each in one line and before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowbp_ray.rewards import base


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
