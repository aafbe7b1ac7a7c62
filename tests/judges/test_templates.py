"""What is asked and what is read off the answers, against answers written by hand."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from flowbp_ray.judges.parsing import Unparsable
from flowbp_ray.judges.templates import AnyTemplate, Template

adapter: TypeAdapter[Any] = TypeAdapter(AnyTemplate)


def template(kind: str, **options: Any) -> Template:
    made = adapter.validate_python({"kind": kind, **options})
    assert isinstance(made, Template)
    return made


def choice(text: str | None) -> dict[str, Any]:
    return {"message": {"content": text}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4.0),
        ("The cat is there. Final Score: 3.5.", 3.5),
        ("**Final Score:** 2\n", 2.0),
        ("final score : [5]", 5.0),
        ("A draft: Final Score: 1. On reflection,\nFinal Score: 4/5", 4.0),
        ("Final Score (1-5): 4", 4.0),
        ("**Final Score (1 – 5):** 4", 4.0),
        ("Final Score: 4\n- 2 cats are there", 4.0),
        ("Final Score: 4, since 3 cats are there", 4.0),
        ("Final Score: 4 out of 5", 4.0),
        ("Final Score: 1 to 5? No. Final Score: 2", 2.0),
    ],
)
def test_unified_reward_1_5_reads_the_last_final_score(text: str, score: float) -> None:
    assert template("unified_reward_1_5").parse(choice(text)) == {"overall": score}


@pytest.mark.parametrize(
    "text", ["", None, "4", "Final Score: good", "Final Score: 7", "Final Score: 0", "Final Score: -3", "Final Score:"]
)
def test_what_is_no_score_raises(text: str | None) -> None:
    with pytest.raises(Unparsable):
        template("unified_reward_1_5").parse(choice(text))


def test_unified_reward_2_0_reads_three_axes_or_none() -> None:
    three = template("unified_reward_2_0")
    text = "Alignment Score (1-5): 3.62\nCoherence Score (1-5): 4\n**Style Score (1-5)**: 2.5"
    assert three.parse(choice(text)) == {"alignment": 3.62, "coherence": 4.0, "style": 2.5}
    with pytest.raises(Unparsable, match="Style Score"):
        three.parse(choice(text.replace("Style", "Fashion")))


@pytest.mark.parametrize(
    "number", ["1 to 5", "2-3", "2 - 3", "2 – 3", "3,5", "2 or 3", "**2**-**3**", "[1 to 5]", "2...3", "3.5.1", "1e3"]
)
def test_a_number_that_goes_on_is_no_score(number: str) -> None:
    with pytest.raises(Unparsable, match="'Final Score' is more than one number"):
        template("unified_reward_1_5").parse(choice(f"Final Score: {number}"))
    axes = f"Alignment Score (1-5): 3\nCoherence Score (1-5): {number}\nStyle Score (1-5): 2"
    with pytest.raises(Unparsable, match="'Coherence Score' is more than one number"):
        template("unified_reward_2_0").parse(choice(axes))


FREE = {"instruction": "{prompt}", "pattern": r"Score: (\d)", "low": 0, "high": 9}


@pytest.mark.parametrize(("kind", "options"), [("unified_reward_1_5", {}), ("free", FREE)])
def test_an_answer_that_was_cut_off_has_no_conclusion(kind: str, options: dict[str, Any]) -> None:
    text = "Final Score: 2, but let me think"
    assert template(kind, **options).parse(choice(text))
    with pytest.raises(Unparsable, match=r"cut off.*max_tokens"):
        template(kind, **options).parse(choice(text) | {"finish_reason": "length"})
    with pytest.raises(Unparsable, match="characters, more than 100000"):
        template(kind, **options).parse(choice("hm " * 40_000 + text))


def test_a_pattern_that_backtracks_without_end_is_given_up() -> None:
    """There are Fibonacci(60) > 10^12 ways to cut 60 letters into ones and twos, and none of them matches."""
    free = template("free", instruction="{prompt}", pattern="((?:a|aa)+)[bc]", low=0, high=9)
    began = time.monotonic()
    with pytest.raises(Unparsable, match="takes longer than 1 s"):
        free.parse(choice("a" * 60))
    assert time.monotonic() - began < 20


def logprobs(**by_token: float) -> dict[str, Any]:
    entries = [{"token": f"token_id:{k[1:]}", "logprob": v} for k, v in by_token.items()]
    return {"logprobs": {"content": [{"token": "token_id:1", "logprob": -0.1, "top_logprobs": entries}]}}


@pytest.mark.parametrize(("yes", "no"), [(-0.2, -1.9), (-30.0, -12.0), (-900.0, -0.5), (-0.5, -900.0)])
def test_yes_no_is_the_softmax_over_the_two(yes: float, no: float) -> None:
    asked = template("yes_no", yes_id=7, no_id=9)
    want = torch.softmax(torch.tensor([yes, no], dtype=torch.float64), 0)[0].item()
    assert asked.parse(logprobs(t7=yes, t9=no, t3=-0.01))["yes"] == pytest.approx(want, abs=1e-12)
    assert asked.fields()["logprob_token_ids"] == [7, 9] and asked.fields()["max_tokens"] == 1


@pytest.mark.parametrize("broken", [{}, {"logprobs": None}, logprobs(t7=-1.0), logprobs(t7=-1.0, t9=math.nan)])
def test_yes_no_without_both_logprobs_raises(broken: dict[str, Any]) -> None:
    with pytest.raises(Unparsable):
        template("yes_no", yes_id=7, no_id=9).parse(broken)


def test_a_free_template_has_scores_of_its_own_names() -> None:
    pattern = r"count=(?P<count>\d+) colour=(?P<colour>\d+)"
    free = template("free", instruction="Rate {prompt} {now}", pattern=pattern, low=0, high=10)
    assert free.scores == ("count", "colour") and free.range == (0.0, 10.0)
    assert free.parse(choice("count=1 colour=2; no: count=3 colour=10")) == {"count": 3.0, "colour": 10.0}
    assert free.text("a {cat}") == "Rate a {cat} {now}"
    with pytest.raises(Unparsable, match="outside"):
        free.parse(choice("count=3 colour=11"))
    one = template("free", instruction="{prompt}", pattern=r"(\S+)$", low=0, high=1)
    assert one.parse(choice("it is 0.25")) == {"score": 0.25}
    for odd in ("nan", "inf", "x"):
        with pytest.raises(Unparsable):
            one.parse(choice(odd))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "free", "instruction": "rate it", "pattern": "(.)", "low": 0, "high": 1}, "{prompt}"),
        ({"kind": "free", "instruction": "{prompt}", "pattern": "(", "low": 0, "high": 1}, "no regular expression"),
        ({"kind": "free", "instruction": "{prompt}", "pattern": "x", "low": 0, "high": 1}, "group"),
        ({"kind": "free", "instruction": "{prompt}", "pattern": "(.)(.)", "low": 0, "high": 1}, "name each"),
        ({"kind": "free", "instruction": "{prompt}", "pattern": "(.)", "low": 1, "high": 1}, "below"),
        ({"kind": "free", "pattern": "(.)", "low": 0, "high": 1}, "instruction"),
        ({"kind": "unified_reward_3"}, "unified_reward_2_0"),
    ],
)
def test_templates_that_cannot_be_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        adapter.validate_python(options)


@pytest.mark.parametrize("kind", ["unified_reward_1_5", "unified_reward_2_0", "yes_no"])
def test_the_question_holds_the_prompt_as_it_is(kind: str) -> None:
    prompt = "a {prompt} of 100 % \\n {0}"
    assert prompt in template(kind).text(prompt)
    assert template(kind, instruction="Rate: {prompt}!").text(prompt) == f"Rate: {prompt}!"
