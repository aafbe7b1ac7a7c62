"""From the text of a judge's answer to numbers. What cannot be read raises `Unparsable`; it is never a zero."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LONGEST = 100_000  # characters of an answer that is read
SCALE = r"(?:\s*\(1\s*[-–]\s*5\))?"  # behind a label, as in "Style Score (1-5):"
GOES_ON = re.compile(r"[*_ \t]*(?:[-–—~]|\.\.+|to|or|and|through)[*_ \t]*\d|[.,]\d|e[+-]?\d", re.IGNORECASE)


class Unparsable(ValueError):
    """An answer that holds no score."""


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
