"""Clients that drip, or never read: uvicorn and the application on a real socket in a thread, with short limits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import uvicorn

from flowbp_ray.rewards.remote import codec, server
from flowbp_ray.rewards.remote.limits import ServerLimits
from flowbp_ray.rewards.remote.server import RequestHandler
from flowbp_ray.rewards.remote.service import Service
from flowbp_ray.rewards.remote.wire import DIGEST, EvaluateRequest
from flowbp_ray.utils.addresses import bearer
from flowbp_ray.utils.http import ask
from tests.rewards.remote.servers import PROMPTS, TOKEN, item, target
from tests.small import small_config

BODY = codec.dump(EvaluateRequest.of(item(), PROMPTS[:2], target(2, None)))


@contextmanager
def listening(service: Service) -> Iterator[tuple[uvicorn.Server, threading.Thread, tuple[str, int]]]:
    """`serve` without its signals, which only a main thread may have."""
    handler = RequestHandler(service, TOKEN)
    running = uvicorn.Server(server.configured(handler))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=running.run, args=([bound],))
        thread.start()
        try:
            yield running, thread, bound.getsockname()
        finally:
            running.should_exit = True
            thread.join()
            handler.worker.shutdown()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    config = small_config(tmp_path_factory.mktemp("run"))
    return Service(config, ServerLimits.of(config))


def head(service: Service) -> bytes:
    """Of a request with `BODY`."""
    lines = {**bearer(TOKEN), DIGEST: service.digest, "Host": "x", "Content-Length": str(len(BODY))}
    return "\r\n".join(["POST /evaluate HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items()), "", ""]).encode()


def test_a_body_that_drips_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte ten times a second, which no timeout between two parts would end; and silence."""
    monkeypatch.setattr(server, "BODY", 1.0)
    monkeypatch.setattr(server, "SLOWEST", 1 << 40)
    with listening(service) as (_, _, address):
        for byte in (b"\0", b""):
            with socket.create_connection(address, 60) as client:
                client.sendall(head(service) + BODY[:100])
                began = time.monotonic()
                client.settimeout(0.1)
                answer = b""
                while not answer and time.monotonic() < began + 30:
                    client.sendall(byte)
                    with suppress(TimeoutError):
                        answer = client.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert 0.9 < time.monotonic() - began < 20
        url, headers = f"http://{address[0]}:{address[1]}", bearer(TOKEN) | {DIGEST: service.digest}
        assert ask(f"{url}/evaluate", "POST", headers, BODY, 60.0, 1 << 24).status == 200


def test_an_answer_that_nobody_reads_does_not_hold_the_end(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More than the buffers of a connection take."""
    monkeypatch.setattr(server, "ANSWERS", 1.0)
    monkeypatch.setattr(service, "evaluate", lambda _: b"\0" * (64 << 20))
    with listening(service) as (running, thread, address), socket.create_connection(address, 60) as client:
        client.sendall(head(service) + BODY)
        assert client.recv(10) == b"HTTP/1.1 2"
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
