"""All that a run's folder says at one moment, read once for a report, and remarks on it in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbp_ray.artifacts.card_phrases import measured_only
from flowbp_ray.artifacts.card_pictures import known_prompts
from flowbp_ray.artifacts.held_out import UNREADABLE, HeldOut, Part, read_held_out
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control import guard
from flowbp_ray.observability.reader import Reader, RunSnapshot
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.run import environment
from flowbp_ray.run.folder import Run

SPREAD = 0.05  # share by which a number of the whole set may fall before a remark says so


@dataclass(frozen=True)
class Findings:
    """What a report is made of.

    lines: of metrics.jsonl. prompts: the held-out ones; none where they are not known any more. training_prompts: their
    number, or None. summary: of summary.json, empty where the run has not finished. verdict: the guard's. starts: see
    `run.environment`.
    """

    run: Run
    seen: RunSnapshot
    lines: Sequence[Mapping[str, Any]]
    prompts: Sequence[PromptRecord]
    training_prompts: int | None
    held_out: HeldOut
    summary: Mapping[str, Any]
    verdict: Mapping[str, Any] | None
    starts: Sequence[Mapping[str, Any]]

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def train(self) -> list[Mapping[str, Any]]:
        """The lines of the steps."""
        return [line for line in self.lines if line["kind"] == "train"]

    @property
    def trained(self) -> list[str]:
        """Names of the metrics that were trained on."""
        return self.config.trained_on

    @property
    def guidance(self) -> float | None:
        """The guidance to speak of first: the first of evaluation.guidance; None where nothing was measured."""
        parts = self.held_out.parts
        return next((g for g in self.config.evaluation.guidance if g in parts), next(iter(parts), None))

    @property
    def finished(self) -> bool:
        return self.seen.stage == "ended" and self.seen.state.startswith("finished")


def read(folder: str | Path) -> Findings:
    """Read a run's folder. Raises ConfigError where it holds no run, or a configuration that is not valid."""
    reader = Reader(folder)
    run, seen = reader.run, reader.snapshot()
    known = known_prompts(run)
    finished = seen.stage == "ended" and seen.state.startswith("finished")
    prompts = known[1] if known else []
    return Findings(
        run=run,
        seen=seen,
        lines=run.metrics(),
        prompts=prompts,
        training_prompts=len(known[0]) if known else None,
        held_out=read_held_out(run, prompts, finished),
        summary=_summary(run) if finished else {},
        verdict=guard.read(run),
        starts=environment.read(run.folder),
    )


def _summary(run: Run) -> dict[str, Any]:
    try:
        return dict(json.loads((run.folder / "summary.json").read_text()))
    except UNREADABLE:
        return {}


def mean_of(value: Any) -> float | None:
    """The mean of a metric in a `Part`, which is an estimate, or a number of the whole set."""
    return value["mean"] if isinstance(value, Mapping) else value


def percent(name: str) -> bool:
    """Whether a metric is shown as a share, as the table at the end of a run does."""
    return name.startswith("verifier")


def said(name: str, value: float | None) -> str:
    """A metric's mean as text."""
    return "none" if value is None else f"{100 * value:.1f} %" if percent(name) else f"{value:.4f}"


def direction(change: Mapping[str, Any] | None) -> str:
    """Where an interval of a change lies: above zero, below zero, contains zero; "" where there is none."""
    if change is None or change.get("low") is None or change.get("high") is None:
        return ""
    return "above zero" if change["low"] > 0 else "below zero" if change["high"] < 0 else "contains zero"


def whole(part: Part) -> list[str]:
    """The metrics of both ends that are over all prompts."""
    return [name for name in part["before"] if "/" not in name and name in part["after"]]


def remarks(found: Findings) -> Iterator[str]:
    """What to know before reading on, most important first; sentences of plain text."""
    if found.verdict is not None:
        yield f"The guard ended the run: {found.verdict['line']}."
    if not found.config.evaluation.prompts:
        yield "Nothing was measured on held-out prompts: evaluation.prompts is null. Training rewards alone say little."
    elif found.held_out.last is None:
        yield "There is no evaluation after the first step yet, so nothing here says whether the model got better."
    elif found.guidance is not None:
        yield from _changes(found, found.guidance)
        yield from _against_guidance(found, found.guidance)
        yield from _fallen(found)
    unchanged = sum(line.get("updated") == 0 for line in found.train)
    if unchanged:
        yield f"{unchanged} of {len(found.train)} steps changed nothing; log.txt says why."
    if faults := sum(line.get("faults") or 0 for line in found.train):
        yield f"{faults:g} values were not finite; log.txt names them."


def _changes(found: Findings, guidance: float) -> Iterator[str]:
    """Which metrics rose, fell, or did neither beyond their intervals, and whether only what was trained on rose."""
    part = found.held_out.parts[guidance]
    names = whole(part)
    kinds = {kind: [n for n in names if direction(part["change"].get(n)) == kind] for kind in _VERBS}
    clauses = [f"{', '.join(kinds[kind])} {verb}" for kind, verb in _VERBS.items() if kinds[kind]]
    if clauses:
        yield f"On held-out prompts at guidance {guidance:g}: {'; '.join(clauses)}."
    independent = [*measured_only(found.config), "verifier"]
    risen = kinds["above zero"]
    if risen and not set(risen) & set(independent):
        others = "nothing else was measured" if not set(names) & set(independent) else "what is only measured did not"
        yield f"Only what was trained on rose; {others}: look at the pictures before you trust it."
    elif not clauses and names:
        yield f"Changes at guidance {guidance:g} have no intervals yet ({found.held_out.source} holds means only)."


_VERBS = {
    "above zero": "rose (the change's 95 % interval is above zero)",
    "below zero": "fell (the interval is below zero)",
    "contains zero": "cannot be told from no change (the interval contains zero)",
}


def _against_guidance(found: Findings, guidance: float) -> Iterator[str]:
    """What guidance alone gives the base, beside the tuned model at the guidance that is spoken of first."""
    parts = found.held_out.parts
    name = next((n for n in ("verifier", *measured_only(found.config)) if n in whole(parts[guidance])), None)
    if name is None or len(parts) < 2:
        return
    best = highest(parts, name, "before")
    tuned = mean_of(parts[guidance]["after"][name])
    if best is None or tuned is None or best[0] == guidance:
        return
    compared = "above" if best[1] > tuned else "not above"
    text = f"Guidance {best[0]:g} alone takes the base to {said(name, best[1])} in {name}, {compared} the tuned model"
    text += f" at guidance {guidance:g} ({said(name, tuned)})"
    after = highest(parts, name, "after")
    yield text + (f"; the tuned model's best is {said(name, after[1])}, at guidance {after[0]:g}." if after else ".")


def highest(parts: Mapping[float, Part], name: str, end: str) -> tuple[float, float] | None:
    """(guidance, mean) at which a metric is highest before or after; None where it was not measured."""
    known = [(g, v) for g, part in parts.items() if (v := mean_of(part[end].get(name))) is not None]
    return max(known, key=lambda pair: pair[1], default=None)


def _fallen(found: Findings) -> Iterator[str]:
    """What fell at other guidances, and numbers of the whole set that fell by more than SPREAD."""
    for guidance, part in found.held_out.parts.items():
        fell = [name for name in whole(part) if direction(part["change"].get(name)) == "below zero"]
        if fell and guidance != found.guidance:
            yield f"At guidance {guidance:g} {', '.join(fell)} fell (the interval is below zero)."
        for name in whole(part):
            before, after = part["before"][name], part["after"][name]
            if isinstance(before, float) and isinstance(after, float) and after < (1 - SPREAD) * before > 0:
                shown = name.replace("_", " ")
                share = 100 * (1 - after / before)
                yield f"At guidance {guidance:g} {shown} fell by {share:.0f} % ({before:.2f} to {after:.2f})."
