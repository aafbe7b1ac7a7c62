"""A real reward server over a real socket: who is let in, the same bits, and bodies of any kind."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from flowbp_ray.messages import unpack
from flowbp_ray.preflight import check
from flowbp_ray.rewards.remote import codec, handshake, token
from flowbp_ray.rewards.remote.client import RemoteScorer
from flowbp_ray.rewards.remote.wire import ScoreRequest
from tests.rewards.remote.servers import BOTH, PROMPTS, TOKEN, Server, asking, bits, item, report, target
from tests.small import scorer_of, small_config

GROWTH = 30 << 20
BODY = codec.dump(ScoreRequest.of(item(), PROMPTS[:2], report(), target(), 4))


def error(content: bytes) -> str:
    return str(json.loads(content)["error"])


def test_the_client_has_the_bits_of_a_scorer(server: Server, tmp_path: Path) -> None:
    """Another process, a socket in between: scores, losses, cotangents and pictures."""
    local = scorer_of(small_config(tmp_path, "flowbp_sparse", BOTH))
    remote = RemoteScorer(asking(tmp_path, server.url), {server.url: server.digest})
    for rows in (2, 3):
        samples = tuple(range(rows))
        arguments = (item(samples), PROMPTS[:rows], report((0.7, 1.3, 1 / 3)[:rows], (True,) * rows))
        (mine, my_cotangent), (theirs, cotangent) = (s.score(*arguments, target(rows)) for s in (local, remote))
        assert bits(unpack(my_cotangent)) == bits(unpack(cotangent)) and unpack(cotangent).any()
        assert (mine.scores, mine.losses, mine.clipped) == (theirs.scores, theirs.losses, theirs.clipped)
    a, b = (s.evaluate(item(), PROMPTS[:2], target(2, None)) for s in (local, remote))
    assert a.scores == b.scores and (a.images == b.images).all()


def test_a_run_that_agrees_with_its_server_may_start(server: Server, tmp_path: Path) -> None:
    config = asking(tmp_path, server.url, "evaluation.batch=4")
    check(config)
    assert handshake.check(config) == {server.url: server.digest}
    assert handshake.check(small_config(tmp_path)) == {}


DISAGREE = {
    "other rewards": (["rewards.monitors=[]"], r'other settings: monitors is \[\] here and \["shapes_clip_heldout"\]'),
    "another clip": (
        ["rewards.terms=[{name: shapes_clip, clip: 0.9}]"],
        "rewards.shapes_clip.clip is 0.9 here and 1.0",
    ),
    "another option": (["rewards.terms=[{name: shapes_clip, options: {dtype: bfloat16}}]"], "options.dtype is"),
    "another jitter": (["rewards.jitter.shift=1"], "settings.jitter.shift is 1 here and 2 there"),
    "more targets per sample": (["method={name: draft_lv, n: 2}"], "branches is 3 here and 1 there"),
    "another batch": (["data.prompts_per_step=8"], "batch is 8 here and 4 there"),
    "larger items": (["evaluation.batch=5"], "takes 4 rows and .* at once, an item of this run has up to 5"),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_a_run_that_wants_something_else_does_not_start(server: Server, tmp_path: Path, case: str) -> None:
    overrides, reason = DISAGREE[case]
    with pytest.raises(ValueError, match=reason) as stop:
        check(asking(tmp_path, server.url, "evaluation.batch=4", *overrides))
    assert "\n" not in str(stop.value) and server.url in str(stop.value)


def test_a_run_without_its_server_or_its_token_does_not_start(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9 does not answer .*Connection refused"):
        check(asking(tmp_path, "http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="/nowhere is no `flowbp-ray serve-reward`; its /health answers 404"):
        check(asking(tmp_path, f"{server.url}/nowhere"))
    monkeypatch.delenv(token.VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"no token for the reward servers; write rewards.token_file"):
        check(asking(tmp_path, server.url, "rewards.token_file=null"))
    monkeypatch.setenv(token.VARIABLE, "another-token-of-the-tests")
    with pytest.raises(ValueError, match=r"refuses the token; write rewards.token_file"):
        check(asking(tmp_path, server.url, "rewards.token_file=null"))
    monkeypatch.setenv(token.VARIABLE, TOKEN)
    check(asking(tmp_path, server.url, "rewards.token_file=null", "evaluation.batch=4"))


def test_health_says_little_without_the_token(server: Server) -> None:
    status, _, content = server.ask("GET", "/health", token=None)
    assert status == 200 and json.loads(content) == {"status": "ready", "version": codec.VERSION}
    about = json.loads(server.ask("GET", "/health")[2])
    assert about["identity"]["terms"] == ["shapes_clip"] and re.fullmatch("[0-9a-f]{16}", about["digest"])
    assert server.ask("GET", "/health", token=TOKEN[:-1])[0] == 401


@pytest.mark.parametrize("given_token", [None, "", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "é" * 16])
def test_nothing_is_scored_without_the_token(server: Server, given_token: str | None) -> None:
    for path in ("/score", "/evaluate"):
        status, _, content = server.ask("POST", path, BODY, given_token)
        assert status == 401 and "Authorization: Bearer" in error(content) and TOKEN not in error(content)


def test_the_size_is_bounded_by_what_is_said_and_by_what_is_sent(server: Server) -> None:
    limit = json.loads(server.ask("GET", "/health")[2])["max_bytes"]
    status, _, content = server.ask("POST", "/score", b"\0" * (limit + 1))
    assert status == 413 and f"at most {limit} bytes" in error(content)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    chunks = (b"\0" * 65536 for _ in range(limit // 65536 + 2))  # without a length, in chunks
    connection.request("POST", "/score", chunks, server.headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.putrequest("POST", "/score")
    for name, value in {**server.headers, "Content-Length": str(10**15)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_other_paths_and_methods(server: Server) -> None:
    """One form of error for all of them, and no way elsewhere: a redirect would name the Host that a client sent."""
    for method, path in (("GET", "/score"), ("POST", "/health"), ("DELETE", "/evaluate")):
        status, _, content = server.ask(method, path, b"")
        assert status == 405 and error(content).startswith("Method Not Allowed: there are GET /health,")
    for method in ("GET", "POST"):
        for path in ("/", "/docs", "/openapi.json", "/score/../x", "/score/", "/evaluate/", "/health/"):
            status, _, content = server.ask(method, path, b"")
            assert status == 404 and error(content).startswith("Not Found: there are GET /health,")


def test_what_is_no_http_is_answered_by_the_parser(server: Server) -> None:
    where = urlsplit(server.url)
    assert where.hostname is not None and where.port is not None
    with socket.create_connection((where.hostname, where.port), 60) as client:
        client.sendall(b"nonsense\r\n\r\n")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"content-type: text/plain" in answer


def bodies() -> st.SearchStrategy[bytes]:
    """Random bytes; a good body with bytes changed, cut or repeated; honest headers of nonsense."""

    def changed(draw: tuple[int, bytes, int]) -> bytes:
        at, patch, end = draw
        good = bytearray(BODY)
        good[at % 1200 : at % 1200 + len(patch)] = patch
        return bytes(good[: max(0, len(good) - end)])

    def headed(text: str) -> bytes:
        head = text.encode("utf-8", "surrogatepass")
        return len(head).to_bytes(8, "little") + head + b"\0" * 64

    number = st.integers(-(2**70), 2**70) | st.floats() | st.booleans() | st.none() | st.text(max_size=5)
    tensor = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "X", ""]),
            "shape": st.lists(st.integers(-(2**65), 2**65), max_size=6),
            "data_offsets": st.lists(st.integers(-(2**65), 2**65), max_size=3),
        }
    )
    fields = ["purpose", "step", "seed", "samples", "prompts", "omega", "target", "batch", "__proto__", "𝓍"]
    message = st.dictionaries(st.sampled_from(fields), st.recursive(number, st.lists, max_leaves=6))
    metadata = message.map(lambda m: {"flowbp_ray": "1", "message": json.dumps(m)})
    header = st.dictionaries(st.sampled_from(["target", "omega", "kept", "\ud800"]), tensor).flatmap(
        lambda tensors: metadata.map(lambda m: json.dumps(tensors | {"__metadata__": m}))
    )
    deep = st.integers(1, 200_000).map(lambda n: "[" * n) | st.integers(1, 100_000).map(lambda n: '{"a":' * n)
    long = st.tuples(st.integers(0, 2**64 - 1), st.binary(max_size=64)).map(lambda t: t[0].to_bytes(8, "little") + t[1])
    cut = st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8), st.integers(0, 3000)).map(changed)
    return st.binary(max_size=2000) | cut | (header | deep | st.text(max_size=200)).map(headed) | long


def asked(server: Server, connection: http.client.HTTPConnection, path: str, body: bytes) -> int:
    """Status of one POST over a connection that stays open."""
    connection.request("POST", path, body, server.headers)
    response = connection.getresponse()
    response.read()
    return response.status


@pytest.mark.long
def test_malformed_bodies_are_refused_and_leave_nothing_behind(server: Server) -> None:
    """Some thousand bodies: 4xx (or 200 where a change did no harm), the process lives, its memory does not grow."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    process, seen, warm = psutil.Process(server.process.pid), [0, 0], 0

    @seed(5)
    @settings(max_examples=350, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies(), st.sampled_from(["/score", "/evaluate"]))
    def fuzz(body: bytes, path: str) -> None:
        status = asked(server, connection, path, body)
        seen[status == 200] += 1
        assert status in (200, 400, 422), (status, body[:200])

    fuzz()  # warm-up, in which what is remembered is filled
    warm = process.memory_info().rss
    rng = random.Random(5)
    for i in range(2000):
        length = rng.choice([0, 3, 8, 100, 5000, 100_000])
        noise = rng.randbytes(length)
        body = (length.to_bytes(8, "little") + noise, noise, BODY[: rng.randrange(len(BODY))] + noise)[i % 3]
        assert asked(server, connection, "/score", body) == 400
    fuzz()
    assert seen[0] > 500
    assert process.memory_info().rss - warm < GROWTH
    assert asked(server, connection, "/score", BODY) == 200 and server.process.poll() is None
    connection.close()


def test_clients_that_break_off_leave_the_server_alone(server: Server) -> None:
    for sent in (0, 10, len(BODY) - 1):
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.putrequest("POST", "/score")
        for name, value in {**server.headers, "Content-Length": str(len(BODY))}.items():
            connection.putheader(name, value)
        connection.endheaders(BODY[:sent])
        connection.close()
    assert server.ask("POST", "/score", BODY)[0] == 200
