"""The section "Soak" of docs/reliability.md, from a soak's figures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from tests.soak.campaign import EVERY, LOOK
from tests.soak.verdicts import BLOCK, BOUNDS, SETTLED

COLUMNS = {
    "memory": "memory, MiB",
    "threads": "threads",
    "files": "open files",
    "sockets": "sockets",
    "references": "objects owned",
}
LOGS = BOUNDS["files of Ray's session"]
UNITS = dict.fromkeys(("object store", "shared memory", "memory of the raylet", "memory of the GCS"), ", MiB")


def section(figures: Mapping[str, Any]) -> str:
    of_processes = [row for row in figures["rows"] if row["of"] != "the run"]
    names = list(dict.fromkeys(row["of"] for row in of_processes))
    table = {(row["of"], row["quantity"]): row for row in figures["rows"]}
    rows = [f"| {name} | " + " | ".join(_cell(table.get((name, key))) for key in COLUMNS) + " |" for name in names]
    others = [
        f"| {row['quantity']}{UNITS.get(row['quantity'], '')} | {_cell(row)} | {row['per']} | {row['verdict']} |"
        for row in figures["rows"]
        if row["of"] == "the run"
    ]
    return "\n".join(
        [
            f"## {figures['name'].capitalize()}",
            _wrapped(_what(figures)),
            "",
            f"| process | {' | '.join(COLUMNS.values())} |",
            f"| --- {'| --- ' * len(COLUMNS)}|",
            *rows,
            "",
            "| of the whole run | level and slope | per | verdict |",
            "| --- | --- | --- | --- |",
            *others,
            "",
            _wrapped(_how(figures)),
            "",
        ]
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _what(figures: Mapping[str, Any]) -> str:
    """What was done, how often, and how it ended."""
    kills, times, steps, faults = (figures[key] for key in ("kills", "recovered", "steps", "faults"))
    killed = ", ".join(f"{role} {count}" for role, count in kills.items())
    recovered = ""
    if times:
        recovered = (
            f" Two more steps were done {times['median']} s after a kill in the median, {times['worst']} s at worst."
        )
    end = "Ctrl-C then left a whole checkpoint and no process." if not faults else f"Faults: {'; '.join(faults)}."
    minutes = f"{figures['seconds'] / 60:.0f}"
    command = (
        "make soak"
        if figures["name"] == "soak"
        else f"python -m tests.soak --minutes {minutes} --name '{figures['name']}'"
    )
    return (
        f"`{command}` ({minutes} minutes, {figures['date']}) trains the embedded model in small "
        f"steps, {steps} of {figures['seconds'] / max(1, steps):.2f} s with all that kills cost, while every "
        f"{EVERY:.0f} s, or once it has recovered, a random actor gets SIGKILL ({killed}), in the last fifth of the "
        f"time none.{recovered} {end} "
        "Each cell is the level and, in brackets, the change per 1,000 steps with its 95 % interval:"
    )


def _how(figures: Mapping[str, Any]) -> str:
    """The verdict, and how slopes are fitted."""
    grown = [f"{row['of']}: {row['quantity']}" for row in figures["rows"] if row["verdict"] == "grows"]
    short = any(row["verdict"] == "too short" for row in figures["rows"])
    verdict = f"Growing: {', '.join(grown)}." if grown else f"All of it is flat{' as far as it can be told' * short}."
    return (
        f"{verdict} Growing means that the interval lies above 0 and the slope above {BOUNDS['memory']:g} MiB, "
        f"{BOUNDS['listening ports']:g} port, {BOUNDS['files']:g} threads, files or sockets, or "
        f"{BOUNDS['references']:g} objects per 1,000 steps and in all. Memory is what no other process shares, in RAM "
        f"or swapped out. Slopes are least squares over means of {BLOCK:.0f} s, after the first quarter, for shared "
        "memory after half of the time: Ray's store gives no page back, so it is the most that was ever held at once. "
        f"An actor is a new process after a kill, so actors are fitted within each process from its step {SETTLED} on, "
        f"over means of {2 * LOOK:.0f} s. "
        f"Ray keeps the logs of processes that have ended: the files of its session may grow by {LOGS:g} per kill, and "
        f"its daemons by {BOUNDS['memory of the GCS']:g} MiB: their slopes per step are what is left beside the kills. "
        "Without kills a run is at work all the time and holds more: what the whole run holds is fitted with a level "
        "of its own for that end."
    )


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["slope"] is None:
        return "too short"
    digits = 1 if abs(row["slope"]) < 100 and row["half"] < 100 else 0
    return f"{row['level']:.0f} ({row['slope']:+.{digits}f} ± {row['half']:.{digits}f})"
