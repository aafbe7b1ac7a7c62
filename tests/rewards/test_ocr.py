"""The OCR reward on text that Pillow draws, against an edit distance of its own, and what of a prompt is quoted."""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.rewards import base
from flowbp_ray.rewards.ocr import OCR, nearness, quoted
from flowbp_ray.rewards.scorer import check_rewards

BLACK, WHITE, YELLOW, BLUE, GREY = (0, 0, 0), (255, 255, 255), (250, 220, 30), (20, 40, 120), (130, 130, 130)


def drawn(text: str, side: int = 256, size: int = 24, ink: Any = BLACK, paper: Any = WHITE) -> Tensor:
    """A picture [3, side, side] in 0..1 with `text` in its middle, in letters of `size` pixels."""
    image = Image.new("RGB", (side, side), paper)
    how = {"font": ImageFont.load_default(size), "fill": ink, "anchor": "mm", "align": "center"}
    ImageDraw.Draw(image).multiline_text((side / 2, side / 2), text, **how)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def edits(a: str, b: str) -> int:
    """Levenshtein's distance by the recurrence of Wagner and Fischer."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return int(table[-1, -1])


@pytest.fixture(scope="module")
def reward() -> OCR:
    return OCR()


@pytest.fixture(scope="module")
def strict() -> OCR:
    return OCR(contained=False)


@pytest.mark.parametrize(
    ("text", "look"),
    [
        ("Hello World", {}),
        ("STOP", {"side": 128, "size": 16, "ink": WHITE, "paper": (180, 20, 20)}),
        ("Open 24 Hours", {"side": 512, "size": 50, "ink": YELLOW, "paper": BLUE}),
        ("Grand\nOpening", {"ink": BLUE, "paper": GREY}),
        ("it's 50% off", {"side": 512, "size": 20}),
    ],
)
def test_text_that_is_there_is_read(strict: OCR, text: str, look: dict[str, Any]) -> None:
    """In several sizes and colours, to the letter."""
    prompts = [f'a poster that says "{text}"', f'a poster that says "{text.upper()}"']
    assert strict.score(torch.stack([drawn(text, **look)] * 2), prompts).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wanted", ["Hello World", "hello word", "Help Wanted", "world", "Closed on Sundays", "q"])
def test_the_score_is_one_minus_the_edits_per_letter(reward: OCR, strict: OCR, wanted: str) -> None:
    image, prompt = drawn("Hello World")[None], [f'a sign "{wanted}"']
    right = wanted.replace(" ", "").lower()
    expected = max(0.0, 1 - edits("helloworld", right) / len(right))
    assert strict.score(image, prompt).item() == pytest.approx(expected)
    assert reward.score(image, prompt).item() == pytest.approx(1.0 if right in "helloworld" else expected)


def test_text_that_is_not_there_is_zero(reward: OCR) -> None:
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.zeros(3, 128, 128), torch.ones(3, 128, 128), noise, drawn("OPEN", 128)])
    scores = reward.score(images, ['the word "OPEN"'] * 3 + ['the word "FULL"'])
    assert scores.tolist() == [0.0, 0.0, 0.0, 0.0] and scores.dtype == torch.float32


def test_noise_over_a_text_lowers_the_score(reward: OCR) -> None:
    image, prompt = drawn("Fresh Coffee"), ['a cup with "Fresh Coffee"'] * 2
    noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(1))
    clear, hidden = reward.score(torch.stack([0.9 * image + 0.1 * noise, 0.1 * image + 0.9 * noise]), prompt)
    assert clear == 1 and hidden < 0.5


def test_rows_are_independent_and_scores_the_same_each_time(reward: OCR) -> None:
    images = torch.stack([drawn(text) for text in ("Salt", "Sale", "Salt and Pepper")])
    prompts = ['"Salt"', "'Salt'", "“Sale” 「Salt」"]
    found = reward.score(images, prompts)
    alone = [reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(3)]
    assert torch.equal(found, torch.cat(alone)) and torch.equal(found, OCR().score(images, prompts))
    assert found[0] == 1 and found[1] == pytest.approx(0.75)


def test_no_picture_is_no_zero(reward: OCR) -> None:
    images = torch.stack([drawn("OPEN", 64, 16)] * 2)
    images[1, 0, 0, 0] = torch.nan
    scores = reward.score(images, ['"OPEN"'] * 2)
    assert scores[0] == 1 and scores[1].isnan()


def test_it_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert OCR().score(drawn("OPEN", 64, 16)[None], ['"OPEN"']).item() == 1


def test_several_quoted_texts_are_one_in_their_order() -> None:
    assert quoted('"Salt" beside “Fine Pepper”') == ["salt", "finepepper"]
    assert nearness("SALT Fine Pepper", ["salt", "finepepper"], contained=False) == 1
    assert nearness("Fine Pepper SALT", ["salt", "finepepper"]) == 1  # each is there
    assert nearness("Fine Pepper SALT", ["salt", "finepepper"], contained=False) == pytest.approx(
        1 - edits("finepeppersalt", "saltfinepepper") / 14
    )
    assert nearness("SALT", ["salt", "finepepper"]) == pytest.approx(1 - 10 / 14)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN"', ["open"]),
        ('New York Skyline with "Hello World" written with fireworks', ["helloworld"]),
        ("“Open” „Zu“ «Ouvert» 「営業中」", ["open", "zu", "ouvert", "営業中"]),
        ("a sign that says 'it's open', at night", ["it'sopen"]),
        ("the baker's sign ‘Baker’s Best’", ["baker'sbest"]),
        ("a dog's bowl that says \"Rex' bowl\"", ["rex'bowl"]),  # a single one within double ones is text
        ('"It’s “here”"', ['it\'s"here"']),
        ('a plate with "" and a cup with " Ｔｅａ　ＴＩＭＥ！ "', ["teatime!"]),
        ('"Straße №1"', ["straßeno1"]),
        ('"a"', ["a"]),
    ],
)
def test_what_a_prompt_quotes(prompt: str, texts: list[str]) -> None:
    assert quoted(prompt) == texts
    base.check_prompts("ocr", {}, [prompt])


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a red circle", "quotes no text"),
        ("the dogs' bowls and the cat's", "quotes no text"),
        ('a sign that says ""', "quotes no text"),
        ('a sign that says " "', "quotes no text"),
        ("", "quotes no text"),
        ('a 12" ruler that says "OK"', "no other half"),
        ("a sign that says “OPEN", "no other half"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_refused(reward: OCR, prompt: str, why: str) -> None:
    """Before actors start, and by name."""
    for ask in (
        lambda: base.check_prompts("ocr", {}, ['"fine"', prompt]),
        lambda: reward.score(torch.zeros(1, 3, 64, 64), [prompt]),
    ):
        with pytest.raises(ValueError, match=why) as raised:
            ask()
        assert repr(prompt) in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_that_measures_it_is_refused_before_it_starts() -> None:
    rewards = RewardsConfig.model_validate({"terms": [{"name": "shapes_clip"}], "monitors": [{"name": "ocr"}]})
    check_rewards(rewards, ['the word "OPEN"'])
    with pytest.raises(ValueError, match="the prompt 'a red circle' quotes no text"):
        check_rewards(rewards, ['the word "OPEN"', "a red circle"])


def test_what_cannot_be_built_is_refused(reward: OCR, monkeypatch: pytest.MonkeyPatch) -> None:
    base.check("ocr", {"confidence": 0.0})
    with pytest.raises(ValueError, match=r"options\.confidence must lie in 0\.\.1, got 2"):
        base.check("ocr", {"confidence": 2})
    with pytest.raises(ValueError, match="'ocr' has no gradient"):
        base.check_trainable("ocr")
    with pytest.raises(ValueError, match="2 images need 2 prompts"):
        reward.score(torch.zeros(2, 3, 64, 64), ['"a"'])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidfuzz" else find(name))
    with pytest.raises(ValueError, match=r"'ocr' needs rapidfuzz; install it with pip install 'flowbp-ray\[ocr\]'"):
        base.check("ocr", {})
