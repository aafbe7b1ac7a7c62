"""The run's side of a remote reward pool: a `Scorer` whose work is done at `rewards.url`."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence

import aiohttp
import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Evaluated, Item, Packed, RolloutReport, Scored
from flowbp_ray.rewards.remote import codec, token
from flowbp_ray.rewards.remote.codec import WireError
from flowbp_ray.rewards.remote.limits import largest_evaluation, largest_score
from flowbp_ray.rewards.remote.validation import wrong_evaluation, wrong_score
from flowbp_ray.rewards.remote.wire import (
    DIGEST,
    HEALTH_TIME,
    LARGEST_LINE,
    EvaluateAnswer,
    EvaluateRequest,
    ScoreAnswer,
    ScoreRequest,
    line,
    reason,
)
from flowbp_ray.utils.addresses import bearer
from flowbp_ray.utils.http import TooLarge, ask

PROBE = 1.0  # seconds after which a server that is away may be asked again whether it is back
IN_TIME = 0.9  # of cluster.stall_timeout, for all tries together: after all of it the driver ends the run
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds between tries
AGAIN = (502, 503, 504)  # the server, or a proxy before it, will answer later
OTHER_SETTINGS = 409  # the server's settings are not those that the run agreed with
LATER = (408, 429)  # in the 400s, although the request is not wrong


def assigned(config: RunConfig, index: int) -> RunConfig:
    """The configuration of reward process `index`: of n addresses it keeps number index mod n."""
    urls = config.rewards.url
    if not urls:
        return config
    return config.model_copy(update={"rewards": config.rewards.model_copy(update={"url": [urls[index % len(urls)]]})})


class Unavailable(RuntimeError):
    """A reward server did not answer, or failed; the same request may succeed later, or at another one."""


class RemoteScorer:
    """Sends the arguments of a `Scorer` to the first address of `rewards.url`, and returns its answer.

    A refusal (a status in the 400s) raises ValueError: it would come again. Lost connections and the statuses of
    `AGAIN` are tried again with growing pauses for half of `cluster.stall_timeout`, then raise `Unavailable`, and the
    item is issued again. A server that fails (500) raises `Unavailable` at once, a silent one after nine tenths of
    `cluster.stall_timeout`.

    agreed: by address the digest of the settings that the run compared with its own. It goes with every request, so
    that a server which starts again with others refuses it (409).
    """

    def __init__(self, config: RunConfig, agreed: Mapping[str, str]) -> None:
        assert config.rewards.url
        self.config, self.url = config, config.rewards.url[0]
        self.headers = bearer(token.read(config.rewards.token_file, "rewards.token_file"))
        self.headers[DIGEST] = agreed[self.url]
        self.timeout = IN_TIME * config.cluster.stall_timeout
        self.patience = config.cluster.stall_timeout / 2

    def pictures(self, target: Packed) -> np.ndarray:
        """Raises ValueError: the server keeps its pictures, and a configuration with a gate and a url is refused."""
        raise ValueError("a gate looks at pictures, which remote reward servers keep; write rewards.url=null")

    def reach(self) -> None:
        """Ask once whether the server would take work. Raises `Unavailable`, `PROBE` seconds after the answer."""
        try:
            answer = ask(f"{self.url}/health", "GET", self.headers, None, HEALTH_TIME, LARGEST_LINE)
            later = answer.status >= 500 or answer.status in LATER  # what else is wrong, the next item is told
            failure = f"answered {answer.status}: {reason(answer.content)}" if later else None
        except (OSError, aiohttp.ClientError) as error:
            failure = f"cannot be reached: {line(error)}"
        if failure:
            time.sleep(PROBE)
            raise Unavailable(f"{self.url}/health {failure}")

    def score(self, item: Item, prompts: Sequence[str], report: RolloutReport, target: Packed) -> tuple[Scored, Packed]:
        """See `Scorer.score`."""
        request = ScoreRequest.of(item, prompts, report, target, self.config.data.shape.batch)
        largest = largest_score(self.config, target)
        answer = self._answer(ScoreAnswer, "/score", codec.dump(request), largest)
        if wrong := wrong_score(self.config, item, target, answer.scored, answer.cotangent):
            raise Unavailable(f"{self.url}/score answered with {wrong}")
        return answer.scored, answer.cotangent

    def evaluate(self, item: Item, prompts: Sequence[str], latents: Packed) -> Evaluated:
        """See `Scorer.evaluate`."""
        request = EvaluateRequest.of(item, prompts, latents)
        largest = largest_evaluation(self.config, item.rows)
        evaluated = self._answer(EvaluateAnswer, "/evaluate", codec.dump(request), largest).evaluated
        if wrong := wrong_evaluation(self.config, item, evaluated):
            raise Unavailable(f"{self.url}/evaluate answered with {wrong}")
        return evaluated

    def _answer(self, kind: type[codec.Message], path: str, body: bytes, largest: int) -> codec.Message:
        """The message that the server answers `body` with; tries again what may succeed later."""
        started, pause, where = time.monotonic(), FIRST_WAIT, self.url + path
        while True:
            wait, left = 0.0, self.timeout - (time.monotonic() - started)
            try:
                answer = ask(where, "POST", self.headers, body, left, largest)
            except (TimeoutError, TooLarge) as error:
                raise Unavailable(f"{where} did not answer well: {line(error)}") from error
            except (OSError, aiohttp.ClientError) as error:
                failure = f"{where} cannot be reached: {line(error)}"
            else:
                if answer.status == 200:
                    return _parsed(kind, where, answer.content)
                status, said = answer.status, reason(answer.content)
                failure = f"{where} answered {status}: {said}"
                if status == OTHER_SETTINGS:
                    raise ValueError(
                        f"rewards.url: {self.url} has other settings than when the run began ({said}); "
                        "start it with those again, or the run with resume=auto, which compares them with its own"
                    )
                if status not in AGAIN:
                    wrong = 400 <= status < 500 and status not in LATER
                    raise (ValueError if wrong else Unavailable)(failure)
                wait = answer.retry_after
            wait = max(wait, pause) * random.uniform(0.5, 1.5)  # not in step with the other clients
            if time.monotonic() - started + wait > self.patience:
                raise Unavailable(f"{failure} (for {time.monotonic() - started:.0f} s)")
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_WAIT)


def _parsed(kind: type[codec.Message], where: str, content: bytes) -> codec.Message:
    try:
        return codec.parse(kind, content)
    except WireError as error:  # a ValueError, but not one that the user could change by another configuration
        raise Unavailable(f"{where} answered with what is no {kind.__name__}: {error}") from error
