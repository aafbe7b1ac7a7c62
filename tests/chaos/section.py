"""The section "Chaos" of docs/reliability.md, from the campaign's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tests.chaos.campaign import RESUMED, SURVIVED, Record
from tests.chaos.configurations import CONFIGURATIONS, MEANING, STALL
from tests.chaos.faults import KINDS
from tests.chaos.planner import STEPS


def section(figures: Mapping[str, Any]) -> str:
    records = [Record(**record) for record in figures["records"]]
    injected = [record for record in records if record.injected]
    rows = [row(kind.name, [r for r in records if r.kind == kind.name]) for kind in KINDS]
    wrong = [record for record in injected if not record.good]
    used = {record.config for record in records}
    return "\n".join(
        [
            "## Chaos",
            "Faults are injected into real runs of the embedded model, each a process as a user starts it, at moments",
            "that are seen from outside. After a fault the run goes on by itself, or it stops with one line that names",
            "the cause and the same command is given again. In the end the digest of the weights and every line of",
            "metrics.jsonl, but for its times, its judges' lines and what counts restarts, are those of a run that",
            "nothing was done to: no sample was trained twice or left out.",
            f"`make chaos` ({figures['minutes']:.0f} minutes on two cores, runs at a time: "
            f"{figures.get('at_once', 1)}, {figures['date']}, seed {figures['seed']}): "
            f"{len(injected)} of {len(records)} planned faults were injected",
            f"into {len({r.run for r in injected})} runs of {STEPS} steps; with those that nothing was done to, "
            f"{figures['starts']} starts."
            + "".join(f" Run {number} was done again by itself." for number in figures.get("again", [])),
            "",
            "| fault | injected | survived without a hand | stopped, resumed to the same bits | otherwise | seconds to "
            "recover: median | worst |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(line for line in rows if line),
            row("all", records),
            "",
            "Seconds are from the fault to the end of the next step (of the third one where something stands still or",
            f"a host is away; stall_timeout is {STALL} s there), a new start included where it took one. A driver",
            "that is killed says no line; all others that stopped did. The configurations: "
            + "; ".join(f"`{name}`: {MEANING[name]}" for name in CONFIGURATIONS if name in used)
            + ".",
            *explained(wrong),
            "",
        ]
    )


def row(name: str, planned: Sequence[Record]) -> str:
    """A line of the table; nothing for a fault that was not planned."""
    if not planned:
        return ""
    records = [record for record in planned if record.injected]
    good = [record for record in records if record.good]
    survived = sum(record.outcome == SURVIVED for record in good)
    resumed = sum(record.outcome == RESUMED for record in good)
    seconds = [record.seconds for record in good if record.seconds is not None]
    times = f"{median(seconds):.1f} | {max(seconds):.1f}" if seconds else "– | –"
    count = f"{len(records)}" if len(records) == len(planned) else f"{len(records)} of {len(planned)}"
    return f"| {name} | {count} | {survived} | {resumed} | {len(records) - len(good)} | {times} |"


def explained(wrong: Sequence[Record]) -> list[str]:
    """A line for each fault that went wrong."""
    lines = [
        f"- {r.kind}, run {r.run}, after step {r.step}: {'; '.join(filter(None, [r.outcome, r.differs, *r.left]))}"
        + (f" ({r.line[:200]})" if r.line else "")
        for r in wrong
    ]
    return ["", "Otherwise:", "", *lines] if lines else []
