"""`flowbp-ray status`: a table of a run's state, once or live while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from flowbp_ray.observability.catalog import ABOUT, TABLE, find
from flowbp_ray.observability.reader import Line, Reader, RunSnapshot, format_duration

REFRESH = 1.0  # seconds between two tables of a live one
MEAN = 5  # steps whose mean reward is compared with that of as many at the start


def print_status(folder: str, watch: bool, console: Console) -> None:
    """Print the table; with `watch` a live one, until the run has ended or is silent, or until Ctrl-C."""
    reader = Reader(folder)
    snapshot = reader.snapshot()
    if not watch:
        console.print(table(snapshot))
        return
    with Live(table(snapshot), console=console, auto_refresh=False) as live:
        try:
            while snapshot.stage == "running":
                time.sleep(REFRESH)
                snapshot = reader.snapshot()
                live.update(table(snapshot), refresh=True)
        except KeyboardInterrupt:
            return


def table(snapshot: RunSnapshot) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, value in rows(snapshot):
        grid.add_row(name, escape(value))
    return grid


def rows(snapshot: RunSnapshot) -> Iterator[tuple[str, str]]:
    """The rows of the table, (name, value) as text, of what is known."""
    last = snapshot.train[-1] if snapshot.train else {}
    yield "run", str(snapshot.folder)
    yield "state", snapshot.state
    yield "step", _step(snapshot, last)
    if snapshot.status.seconds:
        yield "phases", _shares(snapshot.status.seconds)
    if last:
        yield "last step", _family(last, "time", "{:.2f} s")
        for group, form in (("idle", "{:.0%}"), ("queue", "{:.1f}")):
            if text := _family(last, group, form):
                yield group, text
        yield "processes", _processes(snapshot, last)
        yield "rewards", _rewards(snapshot.train)
        yield "loss", _numbers(last, ("loss", "nft_loss", "old_distance", "base_distance", "grad_norm", "kept"))
        if "nft_alike" in last:
            yield "no signal", _numbers(last, ("nft_alike", "nft_unscored"))
        if "drift" in last:
            yield "drift", _numbers(last, ("drift", "drift_max"))
    yield "evaluated", "; ".join(_evaluation(line) for line in snapshot.evaluations) or "not yet"
    yield (
        "checkpoint",
        f"step {snapshot.checkpoint[0]}, {format_duration(snapshot.checkpoint[1])} ago"
        if snapshot.checkpoint
        else "none yet",
    )
    if last:
        yield "trouble", _trouble(snapshot.train)
    for number, line in enumerate(snapshot.warnings):
        yield ("" if number else "log.txt"), line


def _step(snapshot: RunSnapshot, last: Line) -> str:
    text = f"{snapshot.done} of {snapshot.steps}"
    if last:
        text += f", {_plain(last.get('images_per_s'))} images/s"
    if snapshot.status.step_s and snapshot.stage == "running":
        left = snapshot.status.step_s * (snapshot.steps - snapshot.done)
        text += f", {snapshot.status.step_s:.2f} s a step, about {format_duration(left)} left without evaluations"
    return text


def _shares(seconds: Mapping[str, float]) -> str:
    whole = sum(seconds.values()) or 1.0
    return ", ".join(f"{name} {value / whole:.0%} ({format_duration(value)})" for name, value in seconds.items())


def _family(last: Line, group: str, form: str) -> str:
    """The numbers of one of the catalog's groups in a line, as text: families by their tag, others by their key."""
    order = [metric.key for metric in TABLE if metric.group == group and metric.key != "retries"]
    found = [(metric.key, key) for key in last if (metric := find(key)) is not None and metric.key in order]
    found.sort(key=lambda pair: order.index(pair[0]))
    shown = [(key.removeprefix(f"{group}/").removesuffix("_s"), last[key]) for _, key in found]
    return ", ".join(f"{name} {form.format(value)}" for name, value in shown if isinstance(value, int | float))


def _processes(snapshot: RunSnapshot, last: Line) -> str:
    counts = _family(last, "count", "{:.0f}")
    requested = ", ".join(f"{role} {size}" for role, size in snapshot.requested.items())
    return counts + (f"; asked for: {requested}" if requested else "")


def _rewards(train: Sequence[Line]) -> str:
    """Each reward's mean over the last steps, and its change since as many steps at the start."""
    count, parts = min(MEAN, max(1, len(train) // 2)), []
    for key in (key for key in train[-1] if key.startswith("reward/")):
        now, then = (_mean(part, key) for part in (train[-count:], train[:count]))
        change = "" if None in (now, then) or len(train) < 2 else f" ({now - then:+.4f} since the start)"  # type: ignore[operator]
        parts.append(f"{key.removeprefix('reward/')} {_plain(now)}{change}")
    return ", ".join(parts)


def _mean(lines: Sequence[Line], key: str) -> float | None:
    values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
    return sum(values) / len(values) if values else None


def _evaluation(line: Line) -> str:
    means = ", ".join(f"{k} {_plain(v)}" for k, v in line.items() if k not in ABOUT | {"step", "kind"} and "/" not in k)
    return f"after step {line['step']}, guidance {line.get('guidance', 1):g}: {means}"


def _trouble(train: Sequence[Line]) -> str:
    last = train[-1]
    unchanged = sum(line.get("updated") == 0 for line in train)
    return (
        f"{last.get('retries', 0)} calls done again, learners built again {last.get('incarnation', 0)} times, "
        f"{unchanged} steps that changed nothing"
    )


def _numbers(last: Line, keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {_plain(last[key])}" for key in keys if key in last)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"
