"""What a judge is asked, and how its answer becomes numbers. An answer that cannot be read raises; it is never a zero.

The instructions are our own words around the labels that the models were tuned to answer with. To repeat published
numbers write the text that a model was tuned on as `instruction`, with {prompt} where the caption belongs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import regex
from pydantic import Field, field_validator, model_validator

from flowbp_ray.judges.parsing import Unparsable, content, labelled, number, shortened
from flowbp_ray.utils.settings import Strict

PATIENCE = 1.0  # seconds for a pattern to match; nothing else happens in the meantime


class Template(Strict, ABC):
    """One question about one picture."""

    instruction: str | None = None
    """Text of the question, in which {prompt} is replaced by the picture's prompt; other braces stay as they are.
    null: our own words."""

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
    """Longest answer, in tokens. One that is cut off there counts as unparsable."""

    def fields(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": 0}


class UnifiedReward(Written):
    """Scores from 1 to 5 after their labels."""

    max_tokens: int = Field(512, ge=8)
    """Longest answer, in tokens. One that is cut off there counts as unparsable."""

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
    """UnifiedReward 1.5 (arXiv 2503.05236; LLaVA-OneVision-7B, MIT): "Final Score: s", s in 1..5."""

    kind: Literal["unified_reward_1_5"]
    """UnifiedReward 1.5: one score from 1 to 5."""
    ask: Literal["overall", "alignment", "quality"] = "overall"
    """What is rated. overall: everything. alignment: only whether it shows what the caption says (UR-Align).
    quality: only how good a picture it is (UR-IQ)."""

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
    """UnifiedReward 2.0: three scores from 1 to 5, called alignment, coherence and style."""

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
    """

    kind: Literal["yes_no"]
    """One score from 0 to 1: how likely the model's first token is Yes rather than No."""
    yes: str = Field("Yes", min_length=1)
    """Word that affirms; it must be one token of the model."""
    no: str = Field("No", min_length=1)
    """Word that denies; it must be one token of the model."""
    yes_id: int | None = Field(None, ge=0)
    """Token id of `yes`. null: the server is asked for it, at /tokenize."""
    no_id: int | None = Field(None, ge=0)
    """Token id of `no`. null: the server is asked for it, at /tokenize."""

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
    """An instruction of your own, and a regular expression that finds the scores in the answer."""

    kind: Literal["free"]
    """Any model: the scores are the groups of `pattern`."""
    instruction: str = Field(min_length=1)
    """Text of the question, in which {prompt} is replaced by the picture's prompt; other braces stay as they are."""
    pattern: str
    """Regular expression of the PyPI package regex, whose named groups are the scores; a single group without a name
    is called `score`. The last match counts, since models think before they conclude."""
    low: float
    """Worst score. A number below it is unparsable."""
    high: float
    """Best score. A number above it is unparsable."""

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
