"""Whether wandb is online, with servers on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flowbp_ray.observability.wandb_run import chosen_mode, start
from flowbp_ray.utils.addresses import free_port


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    served = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_a_key_and_an_answer_make_it_online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert chosen_mode() == ("offline", "")
    (tmp_path / "netrc").write_text("machine 127.0.0.1\n  login user\n  password " + "a" * 40 + "\n")
    assert chosen_mode() == ("online", "")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert chosen_mode() == ("online", "")
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert chosen_mode() == (mode, "")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match="WANDB_MODE is 'sometimes'; set one of online"):
        chosen_mode()


def test_without_a_network_it_is_offline_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    said: list[str] = []
    run = start(tmp_path, "project", "id", {"steps": 1}, said.append)
    run.log({"reward": 1.0})
    run.finish()
    assert len(said) == 1 and "does not answer" in said[0] and "offline" in said[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start(tmp_path, "project", "id", {}, said.append) is None and len(said) == 1
