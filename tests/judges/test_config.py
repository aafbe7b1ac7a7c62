"""What the `judges:` section refuses, and what it must not start before it has looked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.preflight import check
from tests.judges.fake import Fake
from tests.paths import DATA
from tests.small import small_config, small_overrides
from tests.test_cli import call

DATA = DATA

ASKED = {"kind": "unified_reward_2_0"}


def judge(**fields: Any) -> JudgeConfig:
    return JudgeConfig.model_validate({"name": "eye", "template": ASKED, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "either url"),
        ({"url": "http://a:1", "model": "/b"}, "either url"),
        ({"url": "a:1"}, "is no address"),
        ({"url": "http://a:99999"}, "is no address"),
        ({"url": "http://a:1?key=secret"}, "scheme, host, port and path only"),
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


def test_a_secret_in_a_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a token or a password") as refused:
        small_config(
            tmp_path, "flowbp_sparse", "judges=[{name: a, url: 'http://me:pw12@h:1', template: {kind: yes_no}}]"
        )
    assert "pw12" not in str(refused.value)


def test_names_and_places() -> None:
    three = judge(url="http://a:1/v1/")
    assert three.url == "http://a:1"
    assert three.metrics == {axis: f"eye.{axis}" for axis in ("alignment", "coherence", "style")}
    assert judge(url="http://a:1", template={"kind": "yes_no"}).metrics == {"yes": "eye"}
    assert judge(model="here").model == str(Path("here").absolute())
    gate = judge(url="http://a:1", role="gate", gate={"score": "style", "low": 2})
    assert gate.gate_bounds == ("style", 2.0, 5.0)


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


LEARNED = "judges=[{name: eye, url: 'http://a:1', role: reward, template: {kind: unified_reward_2_0}}]"


@pytest.mark.parametrize(
    ("terms", "more", "says"),
    [
        ("{name: eye.style, kind: judge}", [], "'eye.style': a judge's scores have no gradient; write gradient: none"),
        ("{name: eye, kind: judge, gradient: none}", [], "the judges' metrics are eye.alignment, eye.coherence"),
        ("{name: shapes_verifier, gradient: none}", [], "'eye' has role=reward and no term; .*{name: eye.alignment"),
        ("{name: eye.style, kind: judge, gradient: none}", ["data.images_per_prompt=1"], "write data.images_per"),
        ("{name: eye.style, kind: judge, gradient: none}", ["rewards.url='http://b:2'"], "write rewards.url=null"),
        ("{name: eye.style, kind: judge, gradient: none}", ["judges=[]"], "the judges' metrics are none: write role"),
    ],
)
def test_a_judge_to_learn_from_has_a_term_and_the_term_a_judge(
    tmp_path: Path, terms: str, more: list[str], says: str
) -> None:
    settings = ["method=null", LEARNED, "data.images_per_prompt=2", f"rewards.terms=[{terms}]", *more]
    with pytest.raises(ValueError, match=says):
        small_config(tmp_path, "flowbp_sparse", *settings)


def test_terms_of_several_scores_of_a_judge(tmp_path: Path) -> None:
    """No reward process computes them, and they are no metrics of evaluations."""
    terms = "[{name: eye.style, kind: judge, gradient: none}, {name: eye.alignment, kind: judge, gradient: none}]"
    settings = ["method=null", LEARNED, "data.images_per_prompt=2", f"rewards.terms={terms}"]
    config = small_config(tmp_path, "flowbp_sparse", *settings)
    assert [term.name for term in config.rewards.scored] == ["eye.style", "eye.alignment"]
    assert config.rewards.all == [] and config.judged == [] and config.shows_samples


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


def test_a_key_is_stripped_and_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake(lambda body, before: (200, {})) as fake:
        asked = judge(url=fake.url, api_key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", " secret\n")
        check([asked])
        assert [headers["Authorization"] for headers in fake.gets] == ["Bearer secret"]
        for odd in ("se\ncret", "se\x01cret", "secrét"):
            monkeypatch.setenv("JUDGE_KEY", odd)
            with pytest.raises(ValueError, match="JUDGE_KEY, which has characters that no key has") as refused:
                check([asked])
            assert "cr" not in str(refused.value)
        assert len(fake.gets) == 1


def test_a_redirect_gets_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with (
        Fake(lambda body, before: (200, {})) as elsewhere,
        Fake(lambda body, before: (200, {}), models=302, location=elsewhere.url) as fake,
        pytest.raises(ValueError, match="says 302 and sends elsewhere; write the url where the server is"),
    ):
        check([judge(url=fake.url, api_key_env="JUDGE_KEY")])
    assert elsewhere.gets == []


@pytest.fixture
def no_http() -> Iterator[str]:
    """The address of a server that speaks another protocol."""
    listening = socket.create_server(("127.0.0.1", 0))

    def greet() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listening.accept()
                peer.recv(1000)
                peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\nhello\r\n")
                peer.close()

    threading.Thread(target=greet, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def test_a_bad_address_is_one_line_and_exit_code_2(
    tmp_path: Path, no_http: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """http.client has errors of its own for these, which are no OSError and no ValueError."""
    for url, says in ((no_http, "SSH-2.0-OpenSSH"), ("http://a b:1", "control characters")):
        asked = f"judges=[{{name: eye, url: '{url}', template: {{kind: yes_no}}}}]"
        prompts = f"evaluation.prompts={DATA / 'few_prompts.txt'}"
        given = [o for o in small_overrides(tmp_path) if not o.startswith("evaluation.prompts")]
        assert call("train", "shapes_flowbp_sparse", *given, prompts, asked) == 2
        printed = capsys.readouterr()
        [line] = printed.err.strip().splitlines()
        assert f"judge 'eye': no server answers at {url} (" in line and says in line
