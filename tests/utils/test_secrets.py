"""Secrets do not get into a configuration, a log or a message."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urlencode

import pytest
import requests
import yarl

from flowbp_ray.config import loading
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.preflight import api_key
from flowbp_ray.observability.progress import Progress
from flowbp_ray.observability.status import Status, StatusFile
from flowbp_ray.preflight import check
from flowbp_ray.rewards.remote import token
from flowbp_ray.run import environment
from flowbp_ray.run.folder import Run
from flowbp_ray.utils import secrets
from flowbp_ray.utils.console import guarded
from flowbp_ray.utils.errors import Stalled
from flowbp_ray.utils.secrets import HidingFormatter, check_no_secrets, hidden, ray_tokens, variables
from tests.paths import ROOT
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
        (
            "403: https://cdn.host/f?Expires=1&Signature=aB~c-d_&Key-Pair-Id=K",
            "403: https://cdn.host/f?Expires=1&***&Key-Pair-Id=K",
        ),
        ("https://s3/f?X-Amz-Date=1&X-Amz-Signature=0af3", "https://s3/f?X-Amz-Date=1&***"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz', 'A': 1}", "{'***', 'A': 1}"),
        ("https://storage/f?X-Goog-Date=1&X-Goog-Signature=0af3&a=1", "https://storage/f?X-Goog-Date=1&***&a=1"),
        ('<a href="https://h/f?a=1&amp;Signature=aB~c-d_&amp;b=2">', '<a href="https://h/f?a=1&amp;***&amp;b=2">'),
        (r'{"url": "https://h/f?a=1\u0026Signature=aB~c\u0026b=2"}', r'{"url": "https://h/f?a=1\u0026***\u0026b=2"}'),
        ("x-api-key: 0123456789abcdef0123, a: b", "***, a: b"),
        ('{"api_key": "0123456789abcdef0123", "a": 1}', '{"***", "a": 1}'),
        (r"{\"api_key\": \"0123456789abcdef0123\"}", r"{\"***\"}"),
        ("POST api_key=0123456789abcdef0123 to", "POST *** to"),
        ("api-key: documentation/of/the/server, api-key: documentation-of-the/server", None),
        ("--api-key=path/to/the/keys.txt, api_key=path-to-the-file-of/keys.txt", None),
        ("Authorization: Basic authentication is off, Authorization: Basic Authentication is off", None),
        ("Basic information; api_key=NAME, api_key_env: JUDGE_KEY; api key: none", None),
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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with Ray's folder, and none of Ray's variables."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_the_token_that_ray_makes_is_hidden(home: Path) -> None:
    """By Ray's own command, in the file that it chooses."""
    ray = Path(sys.executable).parent / "ray"
    subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True, env={**os.environ})
    file = home / ".ray" / "auth_token"
    made = file.read_text().strip()
    assert len(made) > 20 and ray_tokens() == {str(file): made}
    assert hidden(f"refused: {made}") == "refused: ***"
    with pytest.raises(ValueError, match=r"name holds what .*/\.ray/auth_token holds") as refused:
        check_no_secrets({"name": f"run-{made}"})
    assert made not in str(refused.value)


def test_rays_token_is_hidden_wherever_ray_finds_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray" / "auth_token").write_text("the-token-at-home\n")
    (home / "other").write_text("  the-token-of-the-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "other"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-token-itself")
    assert hidden("the-token-at-home, the-token-of-the-path, the-token-itself") == "***, ***, ***"
    (home / "other").write_text("another-token-by-now")
    assert hidden("the-token-of-the-path, another-token-by-now") == "the-token-of-the-path, ***"


def test_a_file_that_holds_no_token_of_ray_is_no_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, a folder, a pipe that nobody writes to, a device, a large file, bytes, a short word, no name at all."""
    file, large, short, bytes_, pipe = (home / name for name in ("none", "large", "short", "bytes", "pipe"))
    large.write_text("x" * 5000)
    short.write_text("true")
    bytes_.write_bytes(b"\xff" * 100)
    os.mkfifo(pipe)
    for path in (file, home, large, short, bytes_, pipe, Path("/dev/zero"), Path("/proc/self/mem"), Path("~nobody/x")):
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        assert ray_tokens() == {} and hidden("true, x") == "true, x"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "x" * 5000)
    assert ray_tokens() == {} and ray_tokens({"RAY_AUTH_TOKEN_PATH": "a\0b", "HOME": str(home)}) == {}
    assert stat.S_ISFIFO(pipe.stat().st_mode)


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


SPELLED = ("a/b+c='\"\\é0123", "it's a (secret) & 5%", 'say "no"; 1~2!3*4', "plain-value_0.1~2")


@pytest.mark.parametrize("value", SPELLED)
def test_a_secret_is_hidden_however_it_is_spelled(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the libraries that are used here, and Python, write it."""
    monkeypatch.setenv("A_PASSWORD", value)
    literals = [value, json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value), repr(value.encode())]
    beside = [repr(f"""it's "{value}"""), repr(f"""it's "{value}""".encode()), json.dumps({"a": value})]
    addresses = [quote(value, safe=safe) for safe in ("", "/", "/+", "!*()'~")] + [quote_plus(value)]
    addresses += [quote(value, safe="").replace("%2F", "%2f").replace("%3D", "%3d"), urlencode({"a": value})]
    server = "http://h/x"
    addresses += [str(yarl.URL(server).with_query(a=value)), str(yarl.URL(server) / value), f"{server}?a={value}"]
    addresses += [str(yarl.URL(f"{server}?a={value}"))]
    addresses += [str(requests.Request("GET", server, params={"a": value}).prepare().url)]
    for text in (*literals, *beside, *addresses):
        assert re.search(r"^[^*]*\*\*\*['\"}]*$", hidden(text)), (text, hidden(text))


def test_a_value_of_bytes_that_are_no_text_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps what is not UTF-8 in the environment as surrogates, which an address cannot hold."""
    monkeypatch.setitem(os.environb, b"DB_PASSWORD", b"caf\xe9/secret-value")
    value = os.environ["DB_PASSWORD"]
    assert not value.isprintable()
    raw = os.environb[b"DB_PASSWORD"]
    for text in (value, json.dumps(value), repr(value), repr(raw), quote(raw), quote(raw, safe="")):
        assert hidden(text).strip("b'\"") == "***", text
    registered = secrets.register("\ud800 is no byte")
    assert hidden(f"no {registered}") == "no ***"
    secrets.registered.discard(registered)


def test_a_command_prints_its_line_whatever_the_environment_holds() -> None:
    env = {**os.environb, b"DB_PASSWORD": b"caf\xe9-secret-value", b"PYTHONPATH": str(ROOT).encode()}
    command = [sys.executable, "-m", "flowbp_ray", "train", "nonexistent_config"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("flowbp-ray: unknown config 'nonexistent_config'")


def test_a_traceback_in_the_log_holds_no_secret(key: str) -> None:
    try:
        raise RuntimeError(f"inside {key}")
    except RuntimeError as error:
        raised = (RuntimeError, error, error.__traceback__)
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "outside", (), raised)
    line = HidingFormatter("%(message)s").format(record)
    assert key not in line and "RuntimeError: inside ***" in line
