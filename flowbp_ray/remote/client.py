"""The run's side of a remote reward pool: what a `Scorer` does, done at `rewards.url`."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import ssl
import time
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from flowbp_ray.config import RunConfig
from flowbp_ray.messages import Evaluated, Item, Packed, RolloutReport, Scored
from flowbp_ray.remote import codec, token
from flowbp_ray.remote.codec import WireError
from flowbp_ray.remote.wire import EvaluateAnswer, EvaluateRequest, ScoreAnswer, ScoreRequest

CONNECT = 10.0  # seconds for a connection, and for an answer of /health
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds between tries
AGAIN = (502, 503, 504)  # the server, or a proxy before it, will answer later
LATER = (408, 429)  # in the 400s, and yet no mistake of the request


class Scores(Protocol):
    """What a reward process holds: a `Scorer`, or a `RemoteScorer`."""

    def score(self, item: Item, prompts: Sequence[str], report: RolloutReport, target: Packed) -> tuple[Scored, Packed]:
        """See `Scorer.score`."""
        ...

    def evaluate(self, item: Item, prompts: Sequence[str], latents: Packed) -> Evaluated:
        """See `Scorer.evaluate`."""
        ...


def scorer(config: RunConfig) -> Scores:
    """The rewards of `config`: here, or where `rewards.url` says."""
    if config.rewards.url:
        return RemoteScorer(config)
    from flowbp_ray.scoring import Scorer

    return Scorer(config)


def assigned(config: RunConfig, index: int) -> RunConfig:
    """The configuration of reward process `index`: of n addresses it keeps number index mod n."""
    urls = config.rewards.url
    if not urls:
        return config
    return config.model_copy(update={"rewards": config.rewards.model_copy(update={"url": [urls[index % len(urls)]]})})


class Unavailable(RuntimeError):
    """A reward server did not answer, or failed; the same request may succeed later, or at another one."""


class RemoteScorer:
    """Sends what a `Scorer` would be called with to the first address of `rewards.url`, and returns its answer.

    What is refused with a status in the 400s raises ValueError: it would be refused again. Everything else is tried
    again with growing pauses for half of `cluster.stall_timeout`, then raises `Unavailable`, and the item is issued
    again. A server that fails (500) or is silent raises at once.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.rewards.url
        self.config, self.url = config, config.rewards.url[0]
        self.secret = token.read(config.rewards.token_file, "rewards.token_file")
        self.timeout = config.cluster.stall_timeout
        self.patience = self.timeout / 2

    def score(self, item: Item, prompts: Sequence[str], report: RolloutReport, target: Packed) -> tuple[Scored, Packed]:
        """See `Scorer.score`."""
        request = ScoreRequest.of(item, prompts, report, target, self.config.data.shape.batch)
        answer = self._answer(ScoreAnswer, "/score", codec.dump(request))
        scored, pulled, wanted = answer.scored, answer.cotangent.array.shape, target.array.shape
        if (scored.step, scored.index) != (item.step, item.index) or pulled[-len(wanted) :] != wanted:
            raise Unavailable(f"{self.url} answered for another item: step {scored.step}, {scored.index}, {pulled}")
        return scored, answer.cotangent

    def evaluate(self, item: Item, prompts: Sequence[str], latents: Packed) -> Evaluated:
        """See `Scorer.evaluate`."""
        request = EvaluateRequest.of(item, prompts, latents)
        evaluated = self._answer(EvaluateAnswer, "/evaluate", codec.dump(request)).evaluated
        if evaluated.index != item.index or len(evaluated.images) != len(latents.array):
            raise Unavailable(f"{self.url} answered for another item: {evaluated.index}, {evaluated.images.shape}")
        return evaluated

    def _answer(self, kind: type[codec.Message], path: str, body: bytes) -> codec.Message:
        """The message that the server answers `body` with; tries again what may succeed later."""
        started, pause = time.monotonic(), FIRST_WAIT
        while True:
            wait = 0.0
            try:
                status, retry_after, content = ask(self.url, "POST", path, self.secret, body, self.timeout)
            except TimeoutError as error:
                raise Unavailable(f"{self.url}{path} did not answer within {self.timeout:.0f} s") from error
            except (OSError, http.client.HTTPException) as error:
                failure = f"{self.url}{path} cannot be reached: {_line(error)}"
            else:
                if status == 200:
                    return _parsed(kind, self.url + path, content)
                failure = f"{self.url}{path} answered {status}: {reason(content)}"
                if status not in AGAIN:
                    wrong = 400 <= status < 500 and status not in LATER
                    raise (ValueError if wrong else Unavailable)(failure)
                wait = retry_after
            wait = max(wait, pause) * random.uniform(0.5, 1.5)  # not in step with the other clients
            if time.monotonic() - started + wait > self.patience:
                raise Unavailable(f"{failure} (for {time.monotonic() - started:.0f} s)")
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_WAIT)


def ask(
    url: str, method: str, path: str, secret: str | None, body: bytes | None, timeout: float
) -> tuple[int, float, bytes]:
    """One HTTP exchange over a connection of its own: status, seconds of Retry-After (0 without), and content.

    https is verified against the system's certificates, or those that SSL_CERT_FILE names. Raises OSError (of which
    TimeoutError) and http.client.HTTPException.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    try:
        connection = _connection(parts.scheme, parts.hostname, parts.port)
        connection.connect()
    except TimeoutError as error:  # of the connection, not of the answer
        raise ConnectionError(f"no connection within {CONNECT:.0f} s") from error
    try:
        assert connection.sock is not None
        connection.sock.settimeout(timeout)
        headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
        if secret is not None:
            headers["Authorization"] = f"Bearer {secret}"
        # a server that refuses before it has read everything breaks the pipe, and its answer says why
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, parts.path + path, body, headers)
        response = connection.getresponse()
        content, again = response.read(), response.headers.get("Retry-After", "")
        return response.status, float(again) if again.isdigit() else 0.0, content
    finally:
        connection.close()


def _connection(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=CONNECT, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, port, timeout=CONNECT)


def reason(content: bytes) -> str:
    """The line in which a server says what is wrong."""
    try:
        plain: Any = json.loads(content)
        text = str(plain["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content[:200].decode(errors="replace")
    return " ".join(text.split())[:300] or "nothing"


def _parsed(kind: type[codec.Message], where: str, content: bytes) -> codec.Message:
    try:
        return codec.parse(kind, content)
    except WireError as error:  # a ValueError, but not one that the user could change by another configuration
        raise Unavailable(f"{where} answered with what is no {kind.__name__}: {error}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
