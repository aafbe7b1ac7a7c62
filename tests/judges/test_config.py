"""What the `judges:` section refuses, and what it must not start before it has looked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flowbp_ray.judges.checks import check
from flowbp_ray.judges.config import JudgeConfig
from tests.judges.fake import Fake
from tests.small import small_config

ASKED = {"kind": "unified_reward_2_0"}


def judge(**fields: Any) -> JudgeConfig:
    return JudgeConfig.model_validate({"name": "eye", "template": ASKED, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "either url"),
        ({"url": "http://a:1", "model": "/b"}, "either url"),
        ({"url": "a:1"}, "url"),
        ({"url": "http://a:1", "name": "a.b"}, "name"),
        ({"url": "http://a:1", "role": "gate"}, "one of alignment, coherence, style"),
        ({"url": "http://a:1", "role": "gate", "gate": {"score": "yes"}}, "one of alignment"),
        ({"url": "http://a:1", "role": "gate", "gate": {"score": "style", "low": 5}}, "below gate.high=5"),
        ({"url": "http://a:1", "tries": 0}, "tries"),
        ({"model": "/b", "server": {"args": ["--port", "8000"]}}, "write server.port instead"),
        ({"model": "/b", "server": {"args": ["--served_model_name=x"]}}, "--served-model-name, which is set"),
    ],
)
def test_what_cannot_be_meant(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        judge(**fields)


def test_names_and_places() -> None:
    three = judge(url="http://a:1/v1/")
    assert three.url == "http://a:1"
    assert three.metrics == {axis: f"eye.{axis}" for axis in ("alignment", "coherence", "style")}
    assert judge(url="http://a:1", template={"kind": "yes_no"}).metrics == {"yes": "eye"}
    assert judge(model="here").model == str(Path("here").absolute())
    gate = judge(url="http://a:1", role="gate", gate={"score": "style", "low": 2})
    assert gate.gated == ("style", 2.0, 5.0)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("judges=[{name: shapes_clip, url: 'http://a:1', template: {kind: yes_no}}]", "is taken"),
        ("judges=[{name: eye, url: 'http://a:1', template: {kind: yes_no}}]", "write evaluation.prompts"),
        (
            "judges=[{name: a, model: /m, template: {kind: yes_no}, server: {port: 8000}}, "
            "{name: b, model: /m, template: {kind: yes_no}, server: {port: 8000}}]",
            "'a' and 'b' both have server.port=8000; write two",
        ),
    ],
)
def test_judges_fit_the_rest_of_the_configuration(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small_config(tmp_path, "flowbp_sparse", override)


def test_servers_and_folders_are_looked_for_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Fake(lambda body, before: (200, {})) as fake:
        check([judge(url=fake.url)])
        dead = fake.url
    with pytest.raises(ValueError, match=rf"judge 'eye': no server answers at {dead} .*refused.*another url"):
        check([judge(url=dead)])
    with pytest.raises(ValueError, match=r"has no config\.json"):
        check([judge(model=str(tmp_path))])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no vllm: write server\.python"):
        check([judge(model=str(tmp_path))])
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY, which is not set"):
        check([judge(url=dead, api_key_env="NO_SUCH_KEY")])
