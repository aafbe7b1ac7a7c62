"""A reward server that is busy: who waits, who is sent away, and how it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from flowbp_ray.rewards.remote import codec
from flowbp_ray.rewards.remote.wire import ScoreAnswer, ScoreRequest
from tests.rewards.remote.servers import PROMPTS, item, report, serving, target

BODY = codec.dump(ScoreRequest.of(item(), PROMPTS[:2], report(), target(), 4))


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


def slow(folder: Path) -> str:
    """The reward that writes to `begun` and waits for `gate`."""
    options = f"{{begun: {folder / 'begun'}, gate: {folder / 'gate'}}}"
    return f"rewards.terms=[{{name: slow, kind: 'tests.rewards.remote.slow:Slow', options: {options}}}]"


@pytest.mark.long
def test_a_full_queue_and_a_graceful_end(tmp_path: Path) -> None:
    """One is scored, one waits, a third is sent away. SIGTERM: 503 for what is new, both are finished, exit code 0."""
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with serving(tmp_path, slow(tmp_path), options=("--waiting", "1")) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, "POST", "/score", BODY)
        until(begun.is_file)
        second = pool.submit(server.ask, "POST", "/score", BODY)
        until(lambda: json.loads(server.ask("GET", "/health")[2])["inside"] == 2)
        status, retry_after, content = server.ask("POST", "/score", BODY)
        assert (status, retry_after) == (503, 1.0) and "requests are waiting" in json.loads(content)["error"]
        assert server.ask("GET", "/health")[0] == 200  # which the scoring does not keep from answering

        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/health", token=None)[0] == 503)
        assert json.loads(server.ask("GET", "/health")[2])["status"] == "draining"
        status, retry_after, content = server.ask("POST", "/score", BODY)
        assert (status, retry_after) == (503, 1.0) and "shutting down" in json.loads(content)["error"]
        time.sleep(2.5)  # longer than an idle server takes to end
        assert server.process.poll() is None and not first.done() and not second.done()

        gate.touch()
        answers = [codec.parse(ScoreAnswer, call.result(120)[2]) for call in (first, second)]
        assert [answer.scored.index for answer in answers] == [1, 1]
        assert server.process.wait(120) == 0
    assert begun.read_text() == "2\n2\n"
    assert (tmp_path / "stderr.txt").read_text() == ""


@pytest.mark.long
def test_a_body_that_drips_does_not_hold_the_end(tmp_path: Path) -> None:
    """A client with the token sends a byte at a time: SIGTERM drops what has not arrived, at once and with a 503."""
    with serving(tmp_path) as server:
        host = urlsplit(server.url)
        assert host.hostname is not None and host.port is not None
        with socket.create_connection((host.hostname, host.port), 60) as client:
            lines = {**server.headers, "Host": "x", "Content-Length": str(len(BODY))}
            head = "\r\n".join(["POST /score HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items()), "", ""])
            client.sendall(head.encode() + BODY[:10])
            until(lambda: json.loads(server.ask("GET", "/health")[2])["inside"] == 1)
            server.process.send_signal(signal.SIGTERM)
            client.settimeout(0.1)
            answer, sent = b"", 10
            while not answer and sent < 300:  # half a minute, as long as a body may take anyway
                client.sendall(BODY[sent : sent + 1])
                sent += 1
                with contextlib.suppress(TimeoutError):
                    answer = client.recv(1000)
            assert answer.startswith(b"HTTP/1.1 503 ") and sent < 150
            assert server.process.wait(60) == 0


@pytest.mark.long
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """In the middle of a score that would never end."""
    with serving(tmp_path, slow(tmp_path)) as server, ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.ask, "POST", "/score", BODY)
        until((tmp_path / "begun").is_file)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/health", token=None)[0] == 503)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 1
        with pytest.raises((OSError, aiohttp.ClientError)):
            call.result(60)
