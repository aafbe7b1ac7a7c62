"""What a judge is asked, and how its answer becomes numbers. An answer that cannot be read raises; it is never a zero.

The instructions are our own words around the labels that the models were tuned to answer with. To repeat published
numbers write the text that a model was tuned on as `instruction`, with {prompt} where the caption belongs.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import regex
from pydantic import Field, field_validator, model_validator

from flowbp_ray.utils.settings import Strict

LONGEST = 100_000  # characters of an answer that is read
PATIENCE = 1.0  # seconds for a pattern to match; nothing else happens in the meantime
SCALE = r"(?:\s*\(1\s*[-–]\s*5\))?"  # behind a label, as in "Style Score (1-5):"
GOES_ON = re.compile(r"[*_ \t]*(?:[-–—~]|\.\.+|to|or|and|through)[*_ \t]*\d|[.,]\d|e[+-]?\d", re.IGNORECASE)


class Unparsable(ValueError):
    """An answer that holds no score."""


class Template(Strict, ABC):
    """One question about one picture. instruction: the text, with {prompt} for the picture's own; None: ours.

    Only {prompt} is replaced; other braces stay as they are.
    """

    instruction: str | None = None

    @property
    @abstractmethod
    def scores(self) -> tuple[str, ...]:
        """The names that `parse` gives."""

    @property
    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Worst and best."""

    @abstractmethod
    def question(self, prompt: str) -> str:
        """Our words about a picture of `prompt`."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What the body of the request says besides model and messages."""

    @abstractmethod
    def parse(self, choice: Mapping[str, Any]) -> dict[str, float]:
        """Score name -> value from choices[0] of the answer. Raises Unparsable."""

    def text(self, prompt: str) -> str:
        """What is asked about a picture of `prompt`: the instruction, or ours."""
        return self.question(prompt) if self.instruction is None else self.instruction.replace("{prompt}", prompt)

    @field_validator("instruction")
    @classmethod
    def _names_the_prompt(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("the instruction must say {prompt} where the picture's prompt belongs")
        return value


class Written(Template):
    """Answered in words, by the likeliest token each time."""

    max_tokens: int = Field(512, ge=1)

    def fields(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": 0}


class UnifiedReward(Written):
    """Scores from 1 to 5 after their labels."""

    max_tokens: int = Field(512, ge=8)

    @property
    def range(self) -> tuple[float, float]:
        return 1.0, 5.0


ASPECTS = {
    "overall": "how well it shows what the caption says (objects, their number, attributes and relations) and how good "
    "it is as a picture (sharpness, detail, colour, composition)",
    "alignment": "how well it shows what the caption says: objects, their number, attributes and relations",
    "quality": "how good it is as a picture, whatever the caption says: sharpness, detail, colour, composition",
}


class UnifiedReward15(UnifiedReward):
    """UnifiedReward 1.5 (arXiv 2503.05236; LLaVA-OneVision-7B, MIT): "Final Score: s", s in 1..5.

    ask: overall, or one of the two criteria by itself: alignment (UR-Align) and quality (UR-IQ).
    """

    kind: Literal["unified_reward_1_5"]
    ask: Literal["overall", "alignment", "quality"] = "overall"

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.ask,)

    def question(self, prompt: str) -> str:
        return (
            f"You see an image that was generated from a caption. Rate {ASPECTS[self.ask]}.\n"
            "Give one number from 1 (worst) to 5 (best) after 'Final Score:'.\n"
            f"Text Caption: [{prompt}]"
        )

    def parse(self, choice: Mapping[str, Any]) -> dict[str, float]:
        return {self.ask: labelled(content(choice), "Final Score", *self.range)}


class UnifiedReward20(UnifiedReward):
    """UnifiedReward 2.0 (arXiv 2503.05236; Qwen2.5-VL and Qwen3-VL, MIT): three lines "<Axis> Score (1-5): s"."""

    kind: Literal["unified_reward_2_0"]

    @property
    def scores(self) -> tuple[str, ...]:
        return "alignment", "coherence", "style"

    def question(self, prompt: str) -> str:
        return (
            "You see an image that was generated from a caption. Rate it from 1 (worst) to 5 (best) on three axes:\n"
            "- Alignment: does it show what the caption says?\n"
            "- Coherence: is it consistent in itself, without glitches and distorted things?\n"
            "- Style: does it look good, whatever the caption says?\n\n"
            "Answer in these lines:\n"
            "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
            f"Text Caption: [{prompt}]"
        )

    def parse(self, choice: Mapping[str, Any]) -> dict[str, float]:
        text = content(choice)
        return {axis: labelled(text, f"{axis.capitalize()} Score", *self.range) for axis in self.scores}


class YesNo(Template):
    """P(Yes) / (P(Yes) + P(No)) of the answer's first token: sigma(log P(Yes) − log P(No)).

    The two log probabilities are asked for by token id (vLLM's `logprob_token_ids`), so they are there however small.
    yes, no: one token each. yes_id, no_id: their ids; None: the server's /tokenize is asked.
    """

    kind: Literal["yes_no"]
    yes: str = Field("Yes", min_length=1)
    no: str = Field("No", min_length=1)
    yes_id: int | None = Field(None, ge=0)
    no_id: int | None = Field(None, ge=0)

    @property
    def scores(self) -> tuple[str, ...]:
        return ("yes",)

    @property
    def range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def question(self, prompt: str) -> str:
        return f"Does this image show exactly what the caption says? Answer {self.yes} or {self.no}.\nCaption: {prompt}"

    def fields(self) -> dict[str, Any]:
        assert self.yes_id is not None and self.no_id is not None, "the client asks for the ids first"
        return {
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "logprob_token_ids": [self.yes_id, self.no_id],
            "return_tokens_as_token_ids": True,
        }

    def parse(self, choice: Mapping[str, Any]) -> dict[str, float]:
        try:
            found = choice["logprobs"]["content"][0]["top_logprobs"]
            by_id = {str(entry["token"]).removeprefix("token_id:"): float(entry["logprob"]) for entry in found}
            yes, no = by_id[str(self.yes_id)], by_id[str(self.no_id)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Unparsable(
                f"no log probabilities of the tokens {self.yes_id} and {self.no_id} in the answer; yes_no needs a vLLM "
                "that knows logprob_token_ids"
            ) from error
        if not (math.isfinite(yes) and math.isfinite(no)):
            raise Unparsable(f"the log probabilities of {self.yes!r} and {self.no!r} are {yes} and {no}")
        difference = no - yes
        return {"yes": 0.0 if difference > 700 else 1.0 / (1.0 + math.exp(difference))}


class Free(Written):
    """An instruction and a regular expression of one's own, one of the package regex, which can be given up.

    pattern: its named groups are the scores; one without a name is called `score`. The last match counts, since models
    think before they conclude. low, high: worst and best; a number outside is unparsable.
    """

    kind: Literal["free"]
    instruction: str = Field(min_length=1)
    pattern: str
    low: float
    high: float

    @property
    def scores(self) -> tuple[str, ...]:
        return tuple(regex.compile(self.pattern).groupindex) or ("score",)

    @property
    def range(self) -> tuple[float, float]:
        return self.low, self.high

    def question(self, prompt: str) -> str:
        return self.text(prompt)  # the instruction, which it cannot be without

    def parse(self, choice: Mapping[str, Any]) -> dict[str, float]:
        text = content(choice)
        try:
            matches = list(regex.finditer(self.pattern, text, timeout=PATIENCE))
        except TimeoutError as error:
            raise Unparsable(f"{self.pattern!r} takes longer than {PATIENCE:g} s on {shortened(text)}") from error
        if not matches:
            raise Unparsable(f"no match of {self.pattern!r} in {shortened(text)}")
        found = matches[-1].groupdict() or {"score": matches[-1].group(1)}
        return {name: number(value, name, self.low, self.high) for name, value in found.items()}

    @model_validator(mode="after")
    def _usable(self) -> Free:
        try:
            compiled = regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from error
        if not compiled.groups or (compiled.groupindex and compiled.groups != len(compiled.groupindex)):
            raise ValueError(
                f"pattern {self.pattern!r}: put the number in one group, (...), or each in a named one, (?P<name>...)"
            )
        if not compiled.groupindex and compiled.groups > 1:
            raise ValueError(f"pattern {self.pattern!r} has {compiled.groups} groups; name each: (?P<name>...)")
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self


AnyTemplate = Annotated[UnifiedReward15 | UnifiedReward20 | YesNo | Free, Field(discriminator="kind")]


def content(choice: Mapping[str, Any]) -> str:
    """The text of an answer. Raises Unparsable where it is none, or not all of it."""
    try:
        text = choice["message"]["content"]
    except (KeyError, TypeError) as error:
        raise Unparsable("the answer has no message") from error
    if not isinstance(text, str) or not text.strip():
        raise Unparsable(f"the answer is empty (finish_reason {choice.get('finish_reason')})")
    if choice.get("finish_reason") == "length":  # what looks like a conclusion may be a thought on the way to it
        raise Unparsable(f"the answer was cut off ({shortened(text)}); a larger max_tokens lets it end")
    if len(text) > LONGEST:
        raise Unparsable(f"the answer has {len(text)} characters, more than {LONGEST}")
    return text


def labelled(text: str, label: str, low: float, high: float) -> float:
    """The number after the last "<label>:" or "<label> (1-5):", however it is decorated (**Final Score:** 4)."""
    words = label.replace(" ", r"\s+")
    matches = list(re.finditer(rf"(?i){words}{SCALE}[*_\s]*:[*_\s\[]*(-?\d+(?:\.\d+)?)", text))
    if not matches:
        raise Unparsable(f"no {label!r} with a number in {shortened(text)}")
    last = matches[-1]
    if GOES_ON.match(text, last.end()):
        raise Unparsable(f"{label!r} is more than one number: {shortened(text[last.start() :][:60])}")
    return number(last[1], label, low, high)


def number(text: str | None, name: str, low: float, high: float) -> float:
    """A finite number in low..high."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise Unparsable(f"{name} is {text!r}, which is no number") from error
    if not low <= value <= high:  # also refuses NaN
        raise Unparsable(f"{name} is {value:g}, outside {low:g}..{high:g}")
    return value


def shortened(text: str) -> str:
    """Quoted, on one line, its end kept: a conclusion is there."""
    return repr(text if len(text) <= 120 else f"...{text[-117:]}")
