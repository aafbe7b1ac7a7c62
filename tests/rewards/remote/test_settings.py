"""A reward server that starts again while a run goes on: with the same settings it is taken back, with others not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowbp_ray import driver
from flowbp_ray.driver import Loop
from flowbp_ray.messages import unpack
from flowbp_ray.rewards.remote import codec, handshake
from flowbp_ray.rewards.remote.client import RemoteScorer
from flowbp_ray.rewards.remote.wire import EvaluateRequest, ScoreRequest
from flowbp_ray.utils.errors import RunFailed
from tests.driver.chaos import before_step
from tests.rewards.remote.servers import BOTH, PROMPTS, Server, asking, bits, item, report, serving, target

OTHER = "rewards.terms=[{name: shapes_clip, clip: 0.9}]"


def port(server: Server) -> tuple[str, str]:
    """The options of a server in the place of another."""
    return ("--port", server.url.rpartition(":")[2])


def test_a_request_for_other_settings_is_refused_before_it_is_read(server: Server) -> None:
    """Also one that says nothing of them: a server could not know whether it is meant."""
    score = codec.dump(ScoreRequest.of(item(), PROMPTS[:2], report(), target(), 4))
    evaluate = codec.dump(EvaluateRequest.of(item(), PROMPTS[:2], target(2, None)))
    for path, body in (("/score", score), ("/evaluate", evaluate), ("/score", b"")):
        for digest in ("0" * 16, server.digest[:-1], server.digest + "0", "none"):
            status, _, content = server.ask("POST", path, body, digest=digest)
            assert status == 409, (path, digest)
            assert json.loads(content) == {
                "error": f"the request is for settings {digest[:16]}, these are {server.digest}, see /health"
            }
    assert server.ask("POST", "/score", score)[0] == server.ask("POST", "/evaluate", evaluate)[0] == 200


def test_a_server_that_starts_again_is_asked_for_what_was_agreed(tmp_path: Path) -> None:
    """With another clip it would answer with other gradients; with the old one it has the old bits."""
    arguments = (item(), PROMPTS[:2], report(), target())
    with serving(tmp_path, BOTH) as first:
        config = asking(tmp_path, first.url)
        remote = RemoteScorer(config, handshake.check(config))
        _, before = remote.score(*arguments)
    with serving(tmp_path, BOTH, OTHER, options=port(first)):
        for ask in (lambda: remote.score(*arguments), lambda: remote.evaluate(item(), PROMPTS[:2], target(2, None))):
            with pytest.raises(ValueError, match=r"other settings than when the run began .*; start it with") as stop:
                ask()
            assert "\n" not in str(stop.value) and str(stop.value).startswith(f"rewards.url: {first.url} ")
    with serving(tmp_path, BOTH, options=port(first)):
        assert bits(unpack(remote.score(*arguments)[1])) == bits(unpack(before))


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_with_other_settings_stops_the_run(local_ray: Any, tmp_path: Path) -> None:
    """It starts again after the first step."""
    with serving(tmp_path, BOTH) as first:

        def replace(_: Loop) -> None:
            first.process.kill()
            first.process.wait()
            second.__enter__()

        second = serving(tmp_path, BOTH, OTHER, options=port(first))
        try:
            with before_step(1, replace), pytest.raises(RunFailed, match="other settings than when the run began"):
                driver.train(asking(tmp_path, first.url, "staleness=0", "steps=3"))
        finally:
            second.__exit__(None, None, None)
