"""A reward server that is busy: who waits, who is sent away, and how it ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowbp_ray.remote import codec
from flowbp_ray.remote.wire import ScoreAnswer, ScoreRequest
from tests.remote.servers import PROMPTS, item, report, serving, target

BODY = codec.dump(ScoreRequest.of(item(), PROMPTS[:2], report(), target(), 4))


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.long
def test_a_full_queue_and_a_graceful_end(tmp_path: Path) -> None:
    """One is scored, one waits, a third is sent away. SIGTERM: 503 for what is new, both are finished, exit code 0."""
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    options = f"{{begun: {begun}, gate: {gate}}}"
    terms = f"rewards.terms=[{{name: slow, kind: 'tests.remote.slow:Slow', options: {options}}}]"
    with serving(tmp_path, terms, options=("--waiting", "1")) as server, ThreadPoolExecutor(2) as pool:
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
