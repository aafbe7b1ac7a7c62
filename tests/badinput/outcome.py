"""What becomes of an input: refused in one line that helps, accepted and right, or a fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.preflight import Checked, check

LONGEST = 700  # characters of a message
ADVICE = re.compile(
    r"write|use |rename|put |save|download|set |remove|did you mean|known:|must be|should|needs|indent|keep one|"
    r"expected|different models|leave"
)
"""A message says what is wrong and what to do; these are the words that such messages have."""


@dataclass(frozen=True)
class Case:
    """An input. names: one of these must be in a refusal. right: whether what was read is what the input says.

    may: "refuse" or "accept" where only one of them is right.
    """

    kind: str
    name: str
    config: Path | str
    overrides: Sequence[str] = ()
    names: Sequence[str] = ()
    right: Callable[[RunConfig, Checked], bool] | None = None
    may: str = ""


@dataclass(frozen=True)
class Outcome:
    """verdict: refused, accepted, or what is at fault."""

    kind: str
    name: str
    verdict: str
    message: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in ("refused", "accepted")


def outcome(case: Case) -> Outcome:
    """Load and check as `flowbp-ray train` does before it starts anything."""
    try:
        config = loading.load(case.config, case.overrides)
        checked = check(config)
    except (ValueError, OSError) as error:  # the command prints it and exits with 2
        return Outcome(case.kind, case.name, _refusal(case, str(error)), str(error))
    except Exception as error:  # a traceback
        return Outcome(case.kind, case.name, "traceback", f"{type(error).__name__}: {error}"[:LONGEST])
    if case.may == "refuse":
        return Outcome(case.kind, case.name, "accepted, which is wrong")
    wrong = case.right is not None and not case.right(config, checked)
    return Outcome(case.kind, case.name, "read as something else" if wrong else "accepted")


def _refusal(case: Case, message: str) -> str:
    if case.may == "accept":
        return "refused, which is wrong"
    if "\n" in message:
        return "more than one line"
    if len(message) > LONGEST:
        return "too long a line"
    if case.names and not any(name in message for name in case.names):
        return "names neither file nor key"
    return "refused" if ADVICE.search(message) else "does not say what to write"


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """By kind: cases, refused, accepted, faults."""
    table: dict[str, dict[str, int]] = {}
    for found in outcomes:
        row = table.setdefault(found.kind, {"cases": 0, "refused": 0, "accepted": 0, "faults": 0})
        row["cases"] += 1
        row[found.verdict if found.good else "faults"] += 1
    return table


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by dotted key."""
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = dict(enumerate(value)).items()
    else:
        return {prefix: value}
    return {k: v for key, inner in parts for k, v in flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
