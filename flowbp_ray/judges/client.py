"""Questions to an OpenAI-compatible server: several at once, each with a time limit and retries."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import numpy as np
from PIL import Image

from flowbp_ray.judges.parsing import Unparsable, shortened
from flowbp_ray.judges.templates import Template, YesNo
from flowbp_ray.utils.addresses import bearer
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.http import TooLarge, exchange
from flowbp_ray.utils.random import stream_of_list

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds between two tries
AGAIN = {408, 409, 425, 429}  # and every 5xx: the server may answer later
RETRY_TEMPERATURE = 0.7  # after an unparsable answer: the same question at 0 would get the same answer
LARGEST = 4 << 20  # bytes of an answer
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)  # what reading an answer of another form may raise


class JudgeRefused(RuntimeError):
    """The server will never answer this: the request is wrong."""


class Unanswered(RuntimeError):
    """No answer this time."""


@dataclass(frozen=True)
class RequestPolicy:
    """How hard to try: see `JudgeConfig`."""

    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 4
    backoff: float = 1.0


@dataclass(frozen=True)
class Answers:
    """scores: name -> one number per picture, NaN where there is none. missing: (row, why) of these."""

    scores: dict[str, tuple[float, ...]]
    missing: tuple[tuple[int, str], ...] = ()
    retries: int = 0


@dataclass
class Call:
    """What the questions of one `Client.ask` share, and when they stop: a silent server must not cost the time of all.

    silent: how many questions in a row got no answer in all their tries (a refusal is an answer, and so is one that
    cannot be read). given_up: why the rest is not asked; set when `silent` reaches max(2, concurrency).
    """

    session: aiohttp.ClientSession
    concurrency: int
    retries: int = 0
    silent: int = 0
    given_up: str = ""

    def __post_init__(self) -> None:
        self.turns = asyncio.Semaphore(self.concurrency)

    def unanswered(self, why: str) -> None:
        self.silent += 1
        if self.silent >= max(2, self.concurrency):
            self.given_up = f"given up: {self.silent} questions in a row got no answer (the last one: {why})"


@dataclass(frozen=True)
class Place:
    """Where a judge is. root: of its server. model: its name there; None: the first that the server lists."""

    root: str
    model: str | None = None


@dataclass
class Client:
    """Asks one judge.

    locate: returns where its server is; given True, after a try that failed, it first checks that the server still
    runs. A server of our own is waited for; raises RunFailed where it does not come up.
    request: more fields of every request.
    """

    locate: Callable[[bool], Awaitable[Place]]
    template: Template
    limits: RequestPolicy = RequestPolicy()
    key: str | None = None
    request: dict[str, Any] = field(default_factory=dict)
    known: tuple[Place, str, Template] | None = None  # the model's name at a place, the template with its token ids

    async def ask(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], seeds: Sequence[Sequence[int]]
    ) -> Answers:
        """Scores of images [H, W, 3] uint8. seeds: per picture the key of its random streams (see `utils.random`)."""
        if not len(images) == len(prompts) == len(seeds):
            raise ValueError(f"{len(images)} images need as many prompts and seeds, got {len(prompts)}, {len(seeds)}")
        connector = aiohttp.TCPConnector(limit=0)
        no_limit = aiohttp.ClientTimeout(total=None)  # every try has its own
        async with aiohttp.ClientSession(headers=bearer(self.key), connector=connector, timeout=no_limit) as session:
            call = Call(session, self.limits.concurrency)
            asked = zip(images, prompts, seeds, strict=True)
            found = await all_of([self._one(call, *picture) for picture in asked])
        return Answers(
            {name: tuple(math.nan if isinstance(f, str) else f[name] for f in found) for name in self.template.scores},
            tuple((row, why) for row, why in enumerate(found) if isinstance(why, str)),
            call.retries,
        )

    async def _one(self, call: Call, image: np.ndarray, prompt: str, seed: Sequence[int]) -> dict[str, float] | str:
        """The scores of a picture, or why there are none. Holds its place among `concurrency` for all of its tries."""
        async with call.turns:
            picture, why, warm = "", "", False
            for attempt in range(self.limits.tries):
                if call.given_up:
                    return call.given_up
                if attempt:
                    call.retries += 1
                    await asyncio.sleep(wait(self.limits.backoff, seed, attempt))
                picture = picture or data_url(image)
                try:
                    place = await self.locate(attempt > 0 or call.silent > 0)
                    question = self._try(call.session, place, picture, prompt, seed, attempt if warm else 0)
                    scores = await asyncio.wait_for(question, self.limits.timeout)
                except JudgeRefused as error:
                    call.silent = 0
                    return str(error)
                except RunFailed as error:
                    return str(error)
                except Unparsable as error:
                    call.silent, why, warm = 0, f"unparsable: {error}", True
                except (Unanswered, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                    timed_out = isinstance(error, asyncio.TimeoutError)
                    why = f"no answer within {self.limits.timeout:g} s" if timed_out else described(error)
                else:
                    call.silent = 0
                    return scores
                log.debug("try %d: %s", attempt + 1, why)
            if not warm:
                call.unanswered(why)
            return f"{why} ({self.limits.tries} tries)"

    async def _try(
        self, session: aiohttp.ClientSession, place: Place, picture: str, prompt: str, seed: Sequence[int], warmed: int
    ) -> dict[str, float]:
        """Ask once. warmed: the number of the try if an unparsable answer came before it, else 0."""
        name, template = await self._known(session, place)
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": template.text(prompt)},
        ]
        body = {"model": name, "messages": [{"role": "user", "content": content}], **template.fields()}
        body["seed"] = int(stream_of_list("judge_seed", *seed, warmed).integers(2**31))
        if warmed:
            body["temperature"] = RETRY_TEMPERATURE
        url = f"{place.root}/v1/chat/completions"
        return read(await as_json(session, "POST", url, body | self.request), template)

    async def _known(self, session: aiohttp.ClientSession, place: Place) -> tuple[str, Template]:
        """The model's name and the template with the token ids of Yes and No; asked of the server once per place."""
        if self.known is None or self.known[0] != place:
            root, name, template = place.root, place.model, self.template
            if name is None:
                listed = (await as_json(session, "GET", f"{root}/v1/models")).get("data")
                if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
                    raise JudgeRefused(f"{root}/v1/models lists no model")
                name = listed[0].get("id")
                if not isinstance(name, str):
                    raise JudgeRefused(f"{root}/v1/models lists a model without a name")
            if isinstance(template, YesNo):
                template = template.model_copy(
                    update={
                        "yes_id": await self._id(session, root, name, template.yes, template.yes_id),
                        "no_id": await self._id(session, root, name, template.no, template.no_id),
                    }
                )
            self.known = place, name, template
        return self.known[1:]

    async def _id(self, session: aiohttp.ClientSession, root: str, model: str, word: str, known: int | None) -> int:
        if known is not None:
            return known
        body = {"model": model, "prompt": word, "add_special_tokens": False}
        tokens = (await as_json(session, "POST", f"{root}/tokenize", body)).get("tokens")
        if not isinstance(tokens, list) or [type(token) for token in tokens] != [int]:
            count = f"{len(tokens)} tokens" if isinstance(tokens, list) else "none that /tokenize knows"
            raise JudgeRefused(f"{word!r} is not one token of {model} but {count}; write another word, or its id")
        return tokens[0]


T = TypeVar("T")


async def all_of(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, in order. Where one raises the others are cancelled, and have ended when this returns."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def read(answer: Mapping[str, Any], template: Template) -> dict[str, float]:
    """The scores in an answer. Raises Unparsable for whatever form it has: that costs its own picture and no other."""
    try:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Unparsable(f"the answer has no choices: {shortened(str(answer))}")
        return template.parse(choices[0])
    except Unparsable:
        raise
    except MALFORMED as error:
        raise Unparsable(f"the answer is odd ({type(error).__name__}: {shortened(str(error))})") from error


async def as_json(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> dict[str, Any]:
    """The answer's object. Raises JudgeRefused, Unanswered or Unparsable, by status."""
    try:
        response = await exchange(session, method, url, LARGEST, json=body)
    except TooLarge as error:
        raise Unparsable(f"the answer is longer than {LARGEST} bytes") from error
    status, raw = response.status, response.content
    if 300 <= status < 400:
        raise JudgeRefused(f"{url} said {status} and sends elsewhere; write the url where the server is")
    if status != 200:
        said = f"{url} said {status}: {shortened(raw.decode(errors='replace').strip())}"
        raise (Unanswered if status >= 500 or status in AGAIN else JudgeRefused)(said)
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Unparsable(f"the answer is no JSON: {shortened(raw.decode(errors='replace'))}") from error
    if not isinstance(answer, dict):
        raise Unparsable(f"the answer is no object: {shortened(raw.decode(errors='replace'))}")
    return answer


def data_url(image: np.ndarray) -> str:
    """A PNG of image [H, W, 3] uint8, which keeps every bit; compressed lightly, since the server is near."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def wait(backoff: float, seed: Sequence[int], attempt: int) -> float:
    """Seconds before try `attempt` (1, 2, …): min(60, backoff · 2^(attempt−1)) · u, u in [1/2, 1) keyed by the seed.

    The jitter keeps those that failed together from coming back together.
    """
    u = stream_of_list("judge_retry", *seed, attempt).uniform(0.5, 1.0)
    return float(min(LONGEST_WAIT, backoff * 2.0 ** (attempt - 1)) * u)


def described(error: BaseException) -> str:
    return str(error) or type(error).__name__
