"""What serve-reward and a run with `rewards.url` refuse in one line, before anything is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from flowbp_ray.cli import app
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.memory import Sizes
from flowbp_ray.planning.reward_memory import rewards
from flowbp_ray.rewards.remote import token
from flowbp_ray.rewards.remote.identity import content, different, identity
from flowbp_ray.utils.console import guarded
from flowbp_ray.utils.errors import ConfigError
from tests.rewards.remote.servers import TOKEN, asking, token_file
from tests.small import small_config, small_overrides

NOBODY = "~nosuchuser/token"


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The line that serve-reward prints; its exit code is 2."""
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: app(["serve-reward", "shapes_flowbp_sparse", *small_overrides(folder), *arguments]))
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_serve_reward_needs_a_token_that_cannot_be_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(token.VARIABLE, raising=False)
    short, missing = tmp_path / "short", tmp_path / "missing"
    short.write_text("secret\n")
    assert "no token for the reward servers; write --token-file" in refused(capsys, tmp_path)
    assert "cannot be read" in refused(capsys, tmp_path, "--token-file", str(missing))
    line = refused(capsys, tmp_path, "--token-file", str(short))
    assert "16 or more printable" in line and "secret" not in line
    by_config = f"rewards.token_file={missing}"
    assert refused(capsys, tmp_path, by_config).startswith(
        f"flowbp-ray: rewards.token_file: '{missing}' cannot be read"
    )
    assert "flowbp-ray: --token-file: " in refused(capsys, tmp_path, by_config, "--token-file", str(tmp_path / "none"))
    for option in ("--token-file", "rewards.token_file"):
        arguments = [option, NOBODY] if option.startswith("--") else [f"{option}={NOBODY}"]
        line = refused(capsys, tmp_path, *arguments)
        assert NOBODY in line and ("cannot be read" in line or "the home of nobody here; write the whole path" in line)
    monkeypatch.setenv(token.VARIABLE, "with a space in it, and long")
    assert "$FLOWBP_RAY_REWARD_TOKEN must be" in refused(capsys, tmp_path)


def test_serve_reward_says_what_else_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = ["--token-file", str(token_file(tmp_path))]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be listened at" in refused(capsys, tmp_path, *secret, "--port", port)
    assert "is no address of this machine" in refused(capsys, tmp_path, *secret, "--host", "no.such.host.invalid")
    assert "did you mean 'shapes_clip'?" in refused(capsys, tmp_path, *secret, "rewards.monitors=[shapes_clipp]")


BAD = {
    "ftp://host": "is no address; write for example https://host:8000",
    "host:8000": "is no address",
    "http://": "is no address",
    "http://host:99999": "is no address",
    "http://me:secret@host": "holds a token or a password",
    "http://host?token=secret": "holds a token or a password",
}


@pytest.mark.parametrize("url", BAD)
def test_an_address_that_is_none_or_holds_a_secret(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=BAD[url]):
        asking(tmp_path, f"'{url}'")


def test_a_remote_pool_takes_no_gpu_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.gpus=1 would wait for GPUs .*write rewards\.gpus=0"):
        asking(tmp_path, "http://a:1", "rewards.gpus=1")
    remote, local = asking(tmp_path, "http://a:1"), small_config(tmp_path)
    costs = Costs(local)
    sizes = Sizes.of(local, costs)
    assert rewards(remote, costs, sizes).nbytes == 0 < rewards(local, costs, sizes).nbytes


@pytest.mark.parametrize(
    ("header", "good"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),
        (f"Basic {TOKEN}", False),
        (TOKEN, False),
        (f"Bearer {TOKEN} x", False),
        ("Bearer \xff", False),
        (None, False),
    ],
)
def test_the_header_is_bearer_and_the_token(header: str | None, good: bool) -> None:
    assert token.allowed(header, TOKEN) == good


def test_files_are_compared_by_content(tmp_path: Path) -> None:
    """The same file at another path is the same option; another byte is not. What a run leaves out is the server's."""
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    for path, byte in ((here, b"a"), (there, b"a"), (other, b"b")):
        path.mkdir()
        (path / "model.safetensors").write_bytes(byte)

    def stated(option: str) -> dict[str, object]:
        return identity(small_config(tmp_path, "flowbp_sparse", f"rewards.terms=[{{name: shapes_clip{option}}}]"))

    mine, same, another = (stated(f", options: {{folder: {path}}}") for path in (here, there, other))
    assert different(mine, same) == [] and different(stated(""), mine) == []
    [line] = different(mine, another)
    assert line.startswith("rewards.shapes_clip.options.folder is")
    assert different({**mine, "decoder": None}, mine) == [] and len(different({**mine, "decoder": "x"}, mine)) == 1
    assert content(here, None) == content(there, None) != content(other, None)


@pytest.mark.parametrize("text", ["x" * 5000, "~nosuchuser/x", "a\0b", "a photo of a cat", "/" + "a/" * 3000])
def test_an_option_that_names_no_file_is_compared_as_it_is(tmp_path: Path, text: str) -> None:
    """Whatever the file system says to it."""
    config = small_config(tmp_path, "flowbp_sparse", "rewards.terms=[{name: shapes_clip, options: {prompt: x}}]")
    config.rewards.terms[0].options["prompt"] = text
    assert identity(config)["rewards"]["shapes_clip"]["options"] == {"prompt": text}


def test_a_gate_has_no_remote_servers(tmp_path: Path) -> None:
    """What docs/remote-rewards.md says."""
    gate = "judges=[{name: eye, url: 'http://b:1', role: gate, template: {kind: yes_no}}]"
    with pytest.raises(ConfigError, match=r"a gate .*look at pictures, .*write rewards.url=null"):
        asking(tmp_path, "http://a:1", gate)
