"""The client against a real HTTP server that is slow, broken or silent on purpose."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from typing import Any

import numpy as np
import pytest

from flowbp_ray.judges.client import AGAIN, Answers, Client, Place, RequestPolicy, data_url, wait
from flowbp_ray.judges.templates import Free, UnifiedReward15, YesNo
from tests.judges.fake import Fake, picture_of, said

QUICK = RequestPolicy(concurrency=4, timeout=60.0, tries=3, backoff=0.01)


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8))


def ask(fake: Fake, count: int, limits: RequestPolicy = QUICK, template: Any = None, **more: Any) -> Answers:
    async def here(doubt: bool) -> Place:
        return Place(fake.url)

    client = Client(here, template or UnifiedReward15(kind="unified_reward_1_5"), limits, **more)
    prompts = [f"picture {i}" for i in range(count)]
    return asyncio.run(client.ask(pictures(count), prompts, [(3, i) for i in range(count)]))


def row(body: dict[str, Any]) -> int:
    """Which picture a request is about, by its bits: also a test that they arrive unchanged and with their prompt."""
    shown, text = picture_of(body), body["messages"][0]["content"][1]["text"]
    [found] = [i for i, p in enumerate(pictures(64)) if np.array_equal(p, shown)]
    assert f"picture {found}]" in text or f"picture {found}!" in text, text
    return found


def test_every_picture_gets_its_own_answer_and_no_more_at_once_than_allowed() -> None:
    together = threading.Barrier(QUICK.concurrency, timeout=20)

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        if before < QUICK.concurrency:
            together.wait()  # breaks where they do not come at once
        return 200, said(f"Final Score: {1 + row(body) % 5}")

    with Fake(answer) as fake:
        answers = ask(
            fake, 24, RequestPolicy(concurrency=QUICK.concurrency, tries=1), key="secret", request={"top_k": 1}
        )
    assert answers == Answers({"overall": tuple(1.0 + i % 5 for i in range(24))})
    assert fake.most_at_once == QUICK.concurrency
    assert {h["Authorization"] for h in fake.headers} == {"Bearer secret"}
    assert {(b["model"], b["temperature"], b["top_k"]) for b in fake.bodies} == {("the-model", 0, 1)}


def test_seeds_depend_on_the_picture_alone() -> None:
    seeds = []
    for limits in (QUICK, RequestPolicy(concurrency=1)):
        with Fake(lambda body, before: (200, said("Final Score: 3"))) as fake:
            ask(fake, 6, limits)
        seeds.append({row(body): body["seed"] for body in fake.bodies})
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 6


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_that_fails_for_a_while_costs_retries_and_no_sample(status: int) -> None:
    failed: set[int] = set()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        i = row(body)
        if i % 2 and i not in failed:
            failed.add(i)
            return status, {"error": "busy"}
        return 200, said("Final Score: 2")

    with Fake(answer) as fake:
        answers = ask(fake, 6)
    assert answers == Answers({"overall": (2.0,) * 6}, (), 3)


def test_garbage_is_a_missing_sample_and_never_a_zero() -> None:
    garbage: dict[int, Any] = {
        0: b"<html>", 1: b"[1]", 2: {}, 3: {"choices": []}, 4: said("no idea"), 5: {"choices": [None]}, 6: b"\xff\xfe",
        7: {"choices": [{"message": {"content": None}}]}, 8: said("Final Score: 4"), 9: b"x" * (5 << 20),
        10: b"[" * 100_000, 11: b'{"choices": [' + b"[" * 900 + b"]" * 900 + b"]}", 12: b'{"a": ' + b"9" * 5000 + b"}",
        13: {"choices": [{"message": "hm"}]},
    }  # fmt: skip
    with Fake(lambda body, before: (200, garbage[row(body)])) as fake:
        answers = ask(fake, 14)
    scores, odd = answers.scores["overall"], [i for i in range(14) if i != 8]
    assert [i for i, s in enumerate(scores) if math.isnan(s)] == odd and scores[8] == 4.0
    assert [i for i, _ in answers.missing] == odd
    assert all("unparsable" in why and "3 tries" in why for _, why in answers.missing)
    assert answers.retries == len(odd) * (QUICK.tries - 1)


@pytest.mark.parametrize("value", [10**400, [], {}, None, "x", True])
def test_an_odd_log_probability_costs_its_own_picture_only(value: Any) -> None:
    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        first = value if row(body) == 1 else -1.0
        found = [{"token": f"token_id:{t}", "logprob": v} for t, v in ((7, first), (9, -1.0))]
        return 200, {"choices": [{"logprobs": {"content": [{"top_logprobs": found}]}}]}

    with Fake(answer) as fake:
        answers = ask(fake, 3, template=YesNo(kind="yes_no", instruction="{prompt}!", yes_id=7, no_id=9))
    if value is True:  # a number, to Python
        assert not answers.missing
    else:
        assert [i for i, _ in answers.missing] == [1] and "unparsable" in answers.missing[0][1]
        assert answers.scores["yes"][0] == answers.scores["yes"][2] == 0.5


@pytest.mark.parametrize("tokens", [["x"], [None], [[]], [1.5], "7", [True]])
def test_odd_token_ids_are_refused(tokens: Any) -> None:
    with Fake(lambda body, before: (200, {}), tokens=tokens) as fake:
        answers = ask(fake, 2, template=YesNo(kind="yes_no"))
    assert all("'Yes' is not one token of the-model" in why for _, why in answers.missing) and not fake.bodies


def test_what_nobody_expects_ends_the_other_questions_too() -> None:
    """A picture that is none is our own mistake: it is raised, and no question goes on behind the caller's back."""
    over = threading.Event()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        over.wait(60)
        return 200, said("Final Score: 1")

    async def story(url: str) -> int:
        async def here(doubt: bool) -> Place:
            return Place(url)

        async def late(doubt: bool) -> Place:
            while len(fake.bodies) < 2:
                await asyncio.sleep(0.01)
            raise KeyError("never seen before")

        turns = iter([here, here, late])

        async def locate(doubt: bool) -> Place:
            return await next(turns)(doubt)

        client = Client(locate, UnifiedReward15(kind="unified_reward_1_5"), QUICK)
        with pytest.raises(KeyError, match="never seen"):
            await client.ask(pictures(3), ["x"] * 3, [(i,) for i in range(3)])
        return len(asyncio.all_tasks())

    with Fake(answer) as fake:
        left = asyncio.run(story(fake.url))
        over.set()
    assert left == 1, "the story itself"


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with (
        Fake(lambda body, before: (200, said("Final Score: 3"))) as elsewhere,
        Fake(lambda body, before: (307, {}), location=elsewhere.url) as fake,
    ):
        answers = ask(fake, 2, key="secret")
        assert elsewhere.bodies == [] and elsewhere.gets == []
    assert all("307 and sends elsewhere; write the url" in why for _, why in answers.missing)
    assert len(fake.bodies) == 2


def test_an_unparsable_answer_is_asked_for_again_otherwise() -> None:
    """At temperature 0 the same question has the same answer: it is warmer then, with another seed."""
    with Fake(lambda body, before: (200, said("hm" if body["temperature"] == 0 else "Final Score: 5"))) as fake:
        answers = ask(fake, 1)
    assert answers == Answers({"overall": (5.0,)}, (), 1)
    first, second = fake.bodies
    assert first["seed"] != second["seed"] and second["temperature"] > 0


def test_a_wrong_request_is_not_repeated() -> None:
    with Fake(lambda body, before: (400, {"error": {"message": "bad image"}})) as fake:
        answers = ask(fake, 3)
    assert len(fake.bodies) == 3 and answers.retries == 0
    assert all("400" in why and "bad image" in why for _, why in answers.missing)
    assert 400 not in AGAIN


def test_a_slow_server_is_given_up_and_asked_again() -> None:
    limits, over = RequestPolicy(timeout=2.0, tries=2, backoff=0.01), threading.Event()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        if before != 1:  # the first request, and all of the second story
            over.wait(60)
        return 200, said("Final Score: 1")

    with Fake(answer) as fake:
        assert ask(fake, 1, limits) == Answers({"overall": (1.0,)}, (), 1)
        [(_, why)] = ask(fake, 1, RequestPolicy(timeout=0.5, tries=2, backoff=0.01)).missing
        over.set()
    assert why == "no answer within 0.5 s (2 tries)"


def test_a_silent_server_is_not_asked_for_every_picture() -> None:
    """After as many questions without an answer as may be asked at once, the rest is missing at once."""
    limits, over = RequestPolicy(concurrency=4, timeout=1.0, tries=2, backoff=0.01), threading.Event()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        over.wait(60)
        return 200, said("Final Score: 1")

    with Fake(answer) as fake:
        began = time.monotonic()
        answers = ask(fake, 64, limits)
        took = time.monotonic() - began
        over.set()
    assert len(answers.missing) == 64 and len(fake.bodies) <= 4 * 2 + 3
    assert took < 16, "each picture by itself would make it 64 / 4 · 2 = 32 s"
    assert answers.missing[0][1] == "no answer within 1 s (2 tries)"
    assert answers.missing[-1][1] == "given up: 4 questions in a row got no answer (the last one: no answer within 1 s)"


@pytest.mark.parametrize(
    ("others", "asked"),
    [
        pytest.param((200, said("hm")), 12, id="unparsable"),
        pytest.param((400, {}), 12, id="refused"),
        pytest.param((200, said("Final Score: 3")), 12, id="a score"),
        pytest.param((503, {}), 2, id="no answer either"),
    ],
)
def test_any_answer_says_that_the_server_is_there(others: Any, asked: int) -> None:
    """Every second picture gets none; one is asked about after the other."""
    with Fake(lambda body, before: (503, {}) if row(body) % 2 else others) as fake:
        answers = ask(fake, 12, RequestPolicy(concurrency=1, tries=1))
    given_up = [why for _, why in answers.missing if why.startswith("given up: 2 questions in a row")]
    assert len(fake.bodies) == asked and len(given_up) == 12 - asked


def test_a_dead_server_is_missing_samples() -> None:
    with Fake(lambda body, before: (200, {})) as fake:
        pass  # its port is closed now
    answers = ask(fake, 3)
    assert all(math.isnan(s) for s in answers.scores["overall"]) and len(answers.missing) == 3
    assert "3 tries" in answers.missing[0][1]


def test_backoff_doubles_with_a_jitter_that_is_keyed() -> None:
    """Waits lie in [1/2, 1) of backoff · 2^(try−1), up to a minute, and are the same every time."""
    for i, attempt in itertools.product(range(50), range(1, 12)):
        top = min(60.0, 0.5 * 2.0 ** (attempt - 1))
        assert 0.5 * top <= wait(0.5, (3, i), attempt) < top
        assert wait(0.5, (3, i), attempt) == wait(0.5, (3, i), attempt)
    assert len({wait(0.5, (3, i), 1) for i in range(50)}) == 50
    with Fake(lambda body, before: (500, {})) as fake:
        ask(fake, 1, RequestPolicy(tries=3, backoff=1.0))
    waited = np.diff(fake.times)  # at least; a busy machine adds to it
    assert (waited > [wait(1.0, (3, 0), attempt) - 0.02 for attempt in (1, 2)]).all()


def test_yes_no_asks_for_the_ids_once() -> None:
    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        yes, no = body["logprob_token_ids"]
        found = [{"token": f"token_id:{t}", "logprob": v} for t, v in ((yes, -0.5), (no, -2.5))]
        return 200, {"choices": [{"logprobs": {"content": [{"top_logprobs": found}]}}]}

    with Fake(answer) as fake:
        answers = ask(fake, 5, template=YesNo(kind="yes_no"))
        assert {tuple(b["logprob_token_ids"]) for b in fake.bodies} == {(7, 9)}
        assert answers.scores["yes"] == pytest.approx([1 / (1 + math.exp(-2.0))] * 5, abs=1e-12)
        [(_, why)] = ask(fake, 1, template=YesNo(kind="yes_no", yes="Maybe so")).missing
    assert "'Maybe so' is not one token" in why


def test_pictures_that_are_none_are_refused() -> None:
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            data_url(wrong)


def test_several_scores_of_one_answer() -> None:
    both = Free(kind="free", instruction="{prompt}!", pattern=r"(?P<a>\d) (?P<b>\d)", low=0, high=9)
    with Fake(lambda body, before: (200, said(f"{row(body)} 5" if row(body) else "?"))) as fake:
        answers = ask(fake, 3, template=both)
    assert math.isnan(answers.scores["a"][0]) and math.isnan(answers.scores["b"][0])
    assert answers.scores["a"][1:] == (1.0, 2.0) and answers.scores["b"][1:] == (5.0, 5.0)
