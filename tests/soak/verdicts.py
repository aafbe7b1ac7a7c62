"""From samples to a verdict per quantity: does it grow with the steps that a run does?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from tests.soak.campaign import LOOK, QUIET, Record, Sample
from tests.soak.processes import ACTORS, Process, shared_memory
from tests.soak.slopes import Series, Slope, slope

WARM = 0.25  # of the time, after which memory that is taken once has been taken: each role has been killed by then
HIGHEST = 0.5  # of the time, after which what never falls is fitted: see MARKS
SETTLED = 5  # steps that an actor needs to take what it takes once
BLOCK = 40.0  # seconds of samples whose mean is one point of a fit: two kills
FEWEST_BLOCKS = 8
KEEPERS = ("raylet", "GCS")  # Ray's daemons, which keep something of each process that has ended
LONGER = 30.0  # seconds in which a process that has ended is gone

BOUNDS = {
    "memory": 4.0,
    "threads": 2.0,  # gRPC adds one to a process's pool when that is busy, late in its life or early
    "files": 2.0,
    "sockets": 2.0,
    "references": 5.0,
    "object store": 4.0,
    "objects": 5.0,
    "shared memory": 4.0,
    "listening ports": 1.0,
    "processes": 1.0,
    "files of the run": 2.0,
    "files of Ray's session": 6.0,
    "memory of the raylet": 1.0,
    "memory of the GCS": 1.0,
}
"""What is flat whatever its interval: MiB or a number, per 1,000 steps (per kill for what Ray keeps of each process),
and as much in all where the soak has fewer steps."""

MARKS = ("shared memory",)
"""High-water marks. Ray's store gives no page back, so its shared memory is the most that was ever held at once, and
a rare moment in which there is one version of the weights more raises it once, at any time. A leak raises it on and
on."""

OF_PROCESS: dict[str, Callable[[Process], float]] = {
    "memory": lambda process: process.memory,
    "threads": lambda process: process.threads,
    "files": lambda process: process.files,
    "sockets": lambda process: process.sockets,
}

OF_RUN: dict[str, Callable[[Sample], float]] = {
    "object store": lambda sample: sample.store.used if sample.store else float("nan"),
    "objects": lambda sample: sample.store.objects if sample.store else float("nan"),
    "shared memory": lambda sample: shared_memory(sample.processes),
    "listening ports": lambda sample: sample.ports,
    "processes": lambda sample: len(sample.processes),
    "files of the run": lambda sample: sample.output_files,
}


def figures(record: Record) -> dict[str, Any]:
    """Everything that goes into the JSON: the run, its kills, a line per process and quantity, and the faults."""
    rows = [*_process_rows(record), *_run_rows(record)]
    grown = [
        f"{row['of']}: {row['quantity']} grows by {row['slope']:g} ± {row['half']:g} per {row['per']}"
        for row in rows
        if row["verdict"] == "grows"
    ]
    times = [kill.recovered for kill in record.kills if kill.recovered is not None]
    steps = record.samples[-1].steps if record.samples else 0
    killed = Counter(kill.role for kill in record.kills)
    missed = [f"no {role} was killed" for role in ACTORS if not killed[role]]
    short = sorted({str(row["of"]) for row in rows if row["verdict"] == "too short"})
    missed += [f"too few steps to tell whether anything of {', '.join(short)} grows"] if short else []
    return {
        "seconds": round(record.seconds),
        "steps": steps,
        "kills": {role: killed[role] for role in ACTORS},
        "recovered": {"median": round(median(times), 1), "worst": round(max(times), 1)} if times else None,
        "rows": rows,
        "faults": [*record.faults, *missed, *leaked(record.samples), *grown],
    }


def leaked(samples: Sequence[Sample]) -> list[str]:
    """Roles of which more processes than one were there for longer than LONGER, and zombies that stayed as long."""
    found = []
    for role in (*ACTORS, "encoder"):
        longest = _longest(
            [(s.seconds, sum(p.role == role and not p.zombie for p in s.processes) > 1) for s in samples]
        )
        if longest > LONGER:
            found.append(f"two processes of the {role} at once for {longest:.0f} s")
    zombies = {(p.pid, p.started) for s in samples for p in s.processes if p.zombie}
    for pid, started in sorted(zombies):
        there = [
            (s.seconds, any((p.pid, p.started) == (pid, started) and p.zombie for p in s.processes)) for s in samples
        ]
        if _longest(there) > LONGER:
            found.append(f"process {pid} has ended and was not asked about it for {_longest(there):.0f} s")
    return found


def _longest(states: Sequence[tuple[float, bool]]) -> float:
    """The longest time without a break in which a state held. states: (seconds, whether it holds)."""
    longest, since = 0.0, None
    for seconds, holds in states:
        since = (seconds if since is None else since) if holds else None
        longest = max(longest, 0.0 if since is None else seconds - since)
    return longest


def _process_rows(record: Record) -> list[dict[str, Any]]:
    warm, rows = WARM * record.seconds, []
    for role in _roles(record.samples):
        lives = _lives(record.samples, role, warm)
        kills = [s.kills for life in lives for s, _ in life] if role in KEEPERS and len(lives) == 1 else []
        for quantity, of in OF_PROCESS.items():
            series = [([s.steps / 1000 for s, _ in life], [of(p) for _, p in life]) for life in lives]
            rows.append(_row(role, quantity, _fit(series, role in ACTORS, kills), "1,000 steps"))
        owned = [
            (
                [s.steps / 1000 for s, p in life if s.store],
                [s.store.references.get(p.pid, 0) for s, p in life if s.store],
            )
            for life in lives
        ]
        if any(any(y) for _, y in owned):
            rows.append(_row(role, "references", _fit(owned, role in ACTORS), "1,000 steps"))
    return rows


def _roles(samples: Sequence[Sample]) -> list[str]:
    """The driver, Ray's daemons, the actors, in the order in which a reader looks for them."""
    seen = {process.role for sample in samples for process in sample.processes}
    order = ["driver", *ACTORS, "encoder", "raylet", "GCS", "Ray's agent", "Ray's environment agent"]
    return [role for role in order if role in seen]


def _lives(samples: Sequence[Sample], role: str, warm: float) -> list[list[tuple[Sample, Process]]]:
    """The samples of each process of a role: an actor's from its step SETTLED on, others' after the warm-up."""
    lives: dict[tuple[int, float], list[tuple[Sample, Process]]] = {}
    for sample in samples:
        for process in sample.processes:
            if process.role == role and not process.zombie:
                lives.setdefault((process.pid, process.started), []).append((sample, process))
    if role not in ACTORS:
        return [[(s, p) for s, p in life if s.seconds >= warm] for life in lives.values()]
    return [[(s, p) for s, p in life if s.steps - life[0][0].steps >= SETTLED] for life in lives.values()]


def _run_rows(record: Record) -> list[dict[str, Any]]:
    samples = [s for s in record.samples if s.seconds >= WARM * record.seconds]
    rows = []
    for quantity, of in OF_RUN.items():
        since = (HIGHEST if quantity in MARKS else WARM) * record.seconds
        found = [
            (s.steps / 1000, y, float(s.seconds >= (1 - QUIET) * record.seconds))
            for s in samples
            if s.seconds >= since and (y := of(s)) == y
        ]
        series, quiet = [([x for x, _, _ in found], [y for _, y, _ in found])], [q for _, _, q in found]
        rows.append(_row("the run", quantity, _fit(series, beside=quiet if len(set(quiet)) > 1 else ()), "1,000 steps"))
    for role in KEEPERS:
        life = [(s.kills, p.memory) for s in samples for p in s.processes if p.role == role]
        if not life:
            continue
        series = [([float(kills) for kills, _ in life], [memory for _, memory in life])]
        rows.append(_row("the run", f"memory of the {role}", _fit(series), "kill"))
    logs = [([float(s.kills) for s in samples], [float(s.session_files) for s in samples])]
    rows.append(_row("the run", "files of Ray's session", _fit(logs), "kill"))
    return rows


def _fit(series: Sequence[Series], actor: bool = False, beside: Sequence[float] = ()) -> Slope | None:
    """Means of up to BLOCK seconds; of actors, which live less long, of two samples. beside: see `slope`.

    For what the whole run holds that says which samples are of the quiet end: without kills it is at work all the time.
    """
    longest = max((len(x) for x, _ in series), default=0)
    block = 2 if actor else max(1, min(round(BLOCK / LOOK), longest // FEWEST_BLOCKS))
    return slope(series, block, beside)


def _row(of: str, quantity: str, fit: Slope | None, per: str) -> dict[str, Any]:
    """A line of the JSON. grows: the interval lies above 0, and slope and growth above what is stated in BOUNDS."""
    row: dict[str, Any] = {"of": of, "quantity": quantity, "per": per, "bound": BOUNDS[quantity]}
    if fit is None:
        return row | {"level": None, "slope": None, "half": None, "points": 0, "verdict": "too short"}
    grows = fit.low > 0 and fit.value * min(1.0, fit.span) > BOUNDS[quantity]
    numbers = {"level": round(fit.level, 1), "slope": round(fit.value, 2), "half": round(fit.half, 2)}
    return row | numbers | {"points": fit.points, "verdict": "grows" if grows else "flat"}
