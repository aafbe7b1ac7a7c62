"""One reward server for all tests that only ask it something, and one that answers by a script."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from flowbp_ray.rewards.remote import client
from tests.rewards.remote.scripted import Scripted
from tests.rewards.remote.servers import BOTH, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both shapes rewards, four rows at once, on the small configuration."""
    with serving(tmp_path_factory.mktemp("server"), BOTH, options=("--max-rows", "4")) as running:
        yield running


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that answers as `Scripted.script` says; the client waits less between tries."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    Scripted.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()
