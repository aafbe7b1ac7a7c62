"""Secrets do not get into a configuration, a log or a message."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flowbp_ray.config import loading
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.preflight import api_key
from flowbp_ray.observability.progress import Progress
from flowbp_ray.observability.status import Status, StatusFile
from flowbp_ray.preflight import check
from flowbp_ray.rewards.remote import token
from flowbp_ray.run import environment
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.console import guarded
from flowbp_ray.utils.errors import Stalled
from flowbp_ray.utils.secrets import HidingFormatter, check_no_secrets, hidden, variables
from tests.small import small_config, small_overrides

VALUE = "a1b2c3d4e5f6-not-to-be-seen"
JUDGE: dict[str, Any] = {"name": "j", "url": "http://127.0.0.1:9", "template": {"kind": "yes_no"}}


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    return VALUE


def test_which_variables_hold_secrets(tmp_path: Path) -> None:
    file = tmp_path / "a file that holds one"
    file.touch()
    secret = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "MY_SECRET",
              "openai_apikey")  # fmt: skip
    open_ = {"TOKENIZERS_PARALLELISM": VALUE, "RAY_AUTH_TOKEN_PATH": VALUE, "RAY_AUTH_MODE": "token", "HOME": VALUE,
             "SHORT_TOKEN": "true", "SSL_KEY": str(file), "MONKEY": VALUE}  # fmt: skip
    assert variables({**dict.fromkeys(secret, f" {VALUE}\n"), **open_}) == dict.fromkeys(secret, VALUE)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"key {VALUE}, and {VALUE}", "key ***, and ***"),
        ("https://user:pass@host:1/x", "https://***@host:1/x"),
        ("http://host/x?a=1&token=abc&b=2", "http://host/x?a=1&***&b=2"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("hf_" + "a" * 34, "***"),
        ("sk-proj-" + "a" * 40, "***"),
        ("ghp_" + "a" * 36, "***"),
        ("AKIA" + "A" * 16, "***"),
        ("a token, tasks-and-more, http://host:80/a@b, key=3, half_finished", None),
    ],
)
def test_what_is_hidden(text: str, left: str | None, key: str) -> None:
    assert hidden(text) == (text if left is None else left)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        (f"name={VALUE}", r"name holds what \$WANDB_API_KEY holds"),
        ("name=${oc.env:WANDB_API_KEY}", r"name holds what \$WANDB_API_KEY holds"),
        ("backbone.path=https://user:pass@host/model", "backbone.path holds a token"),
        ("rewards.url=ftp://user:pass@host", "rewards.url holds a token"),
        ("output=hf_" + "a" * 34, "output holds a token"),
        ("rewards.monitors=[{name: shapes_clip, options: {api_key: abc}}]", r"monitors\[0\].options.api_key names"),
    ],
)
def test_a_configuration_with_a_secret_is_refused(override: str, where: str, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=where) as refused:
        loading.load("shapes_flowbp_sparse", [*small_overrides(tmp_path), override])
    assert "\n" not in str(refused.value)
    assert not any(secret in str(refused.value) for secret in (key, "user:pass", "hf_aaa", "abc"))


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"server": {"env": {"HF_TOKEN": "abc"}}}, r"judges\[0\].server.env.HF_TOKEN names"),
        ({"server": {"args": ["--api-key", "abc"]}}, r"judges\[0\].server.args\[0\] names a secret \(--api-key\)"),
        ({"server": {"args": ["--seed", "1", "--hf-token=abc"]}}, r"server.args\[2\] names a secret \(--hf-token\)"),
        ({"request": {"extra": {"Authorization": "abc"}}}, r"request.extra.Authorization names"),
        ({"api_key": "abc"}, r"judges\[0\].api_key names"),
    ],
)
def test_a_judge_with_a_secret_is_refused(entry: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=where) as refused:
        check_no_secrets({"judges": [JUDGE | entry]})
    assert "abc" not in str(refused.value) and "api_key_env=NAME" in str(refused.value)


def test_a_key_is_hidden_whatever_its_variable_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MYJUDGE", "a-key-of-a-gateway")
    plain = JUDGE | {"api_key_env": "MYJUDGE"}
    with pytest.raises(ValueError, match=r"name holds what \$MYJUDGE holds"):
        check_no_secrets({"name": "a-key-of-a-gateway", "judges": [plain]})
    assert api_key(JudgeConfig.model_validate(plain)) == "a-key-of-a-gateway"
    (tmp_path / "token").write_text("the-token-of-a-file\n")
    assert token.read(tmp_path / "token", "rewards.token_file") == "the-token-of-a-file"
    assert hidden("401: a-key-of-a-gateway, the-token-of-a-file") == "401: ***, ***"


def test_what_is_called_like_a_secret_and_is_none() -> None:
    plain = {"rewards": {"token_file": "/a/file"}, "judges": [JUDGE | {
        "api_key_env": "JUDGE_KEY", "request": {"max_tokens": 5, "chat_template_kwargs": {"eos_token": "<end>"}},
        "server": {"args": ["--hf-token", "--ssl-keyfile", "/k.pem"], "env": {"TOKENIZERS_PARALLELISM": "false"}},
    }]}  # fmt: skip
    check_no_secrets(plain)


def test_a_configuration_made_in_python_is_refused_too(tmp_path: Path, key: str) -> None:
    config = small_config(tmp_path)
    with pytest.raises(ValueError, match=r"tracking\.project holds what"):
        check(config.model_copy(update={"tracking": config.tracking.model_copy(update={"project": f"p-{key}"})}))


def test_files_of_a_run_hold_no_secret(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the writers are given holds one each time: command line, log with its traceback, stall, notes, status."""
    monkeypatch.setattr("sys.argv", ["flowbp-ray", "train", f"--x={key}"])
    run = Run.create(small_config(tmp_path))
    run.keep()
    with pytest.raises(ValueError, match="from"), run.locked(print):
        run.logger().info("a line with %s", key)
        raise ValueError(f"a message from {key}")
    with pytest.raises(Stalled), run.locked(print):
        raise Stalled("stalled", {"waits": [key]})
    StatusFile(run.folder).write(Status(steps=1, waiting=key, why=f"https://user:{key}@host"), force=True)
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"environment.jsonl", "log.txt", "stalled.json", "status.json"}
    for path in files:
        assert key not in path.read_text() and "user:" not in path.read_text(), path
    assert environment.read(run.folder)[0]["command"] == "flowbp-ray train --x=***"
    assert "a message from ***" in (run.folder / "log.txt").read_text()
    assert json.loads((run.folder / "stalled.json").read_text()) == {"waits": ["***"]}


def test_what_is_printed_holds_no_secret(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    Progress(1).note(f"wandb: no answer with {key}")

    def fails() -> None:
        raise ValueError(f"no answer with {key}")

    with pytest.raises(SystemExit):
        guarded(fails)
    said = capsys.readouterr()
    assert said.out == "wandb: no answer with ***\n" and said.err == "flowbp-ray: no answer with ***\n"


def test_a_traceback_in_the_log_holds_no_secret(key: str) -> None:
    try:
        raise RuntimeError(f"inside {key}")
    except RuntimeError as error:
        raised = (RuntimeError, error, error.__traceback__)
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "outside", (), raised)
    line = HidingFormatter("%(message)s").format(record)
    assert key not in line and "RuntimeError: inside ***" in line
