"""What the runs of a suite measured: means over seeds with intervals, the best of each column, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flowbp_ray.artifacts.findings import mean_of
from flowbp_ray.comparing.runs import done
from flowbp_ray.comparing.suite import BASE, Cell, Suite
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.text_files import read_json


@dataclass(frozen=True)
class Value:
    """A cell of the table. half: of the 95 % interval over seeds (Student's t); None for fewer than two seeds.

    mark: "best" of its column; "close" where the difference from the best, seed by seed, has an interval that holds
    zero; "" elsewhere, and where seeds are too few to say. Of a difference: "clear" where its interval is without zero.
    """

    mean: float
    half: float | None
    seeds: int
    mark: str = ""

    def shown(self, percent: bool, sign: str = "") -> str:
        """`62.1 ± 1.4 %`, or `0.512 ± 0.010`; sign="+" for a difference. `–` where nothing was measured."""
        if not np.isfinite(self.mean):
            return "–"
        factor, digits = (100, 1) if percent else (1, 3)
        half = "" if self.half is None else f" ± {factor * self.half:.{digits}f}"
        return f"{factor * self.mean:{sign}.{digits}f}{half}{' %' if percent else ''}"


@dataclass(frozen=True)
class Curve:
    """A row's held-out metric after its evaluations: means over seeds by step, with images and hours so far."""

    steps: Sequence[int]
    images: Sequence[float]
    hours: Sequence[float]
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Comparison:
    """What a suite found so far.

    table: row -> column -> value, the base first. differences: the same of each row minus the suite's reference.
    curves: by row. missing: runs without a result, as lines.
    """

    suite: Suite
    columns: Sequence[str]
    table: Mapping[str, Mapping[str, Value]]
    differences: Mapping[str, Mapping[str, Value]]
    curves: Mapping[str, Curve]
    missing: Sequence[str]
    guidance: str
    raw: Sequence[Mapping[str, Any]] = field(default=())

    def markdown(self) -> str:
        """The table; the best of a column is bold, and what cannot be told from it has a ≈. Then the differences."""
        lines = self._rows(self.table, "")
        if self.differences:
            lines += ["", f"Minus {self.suite.reference}, seed by seed; bold where the interval is without zero:", ""]
            lines += self._rows(self.differences, "+")
        return "\n".join(lines)

    def _rows(self, rows: Mapping[str, Mapping[str, Value]], sign: str) -> list[str]:
        lines = ["| | " + " | ".join(self.columns) + " | seeds |", "|" + "---|" * (len(self.columns) + 2)]
        for row, values in rows.items():
            cells = [marked(values[c].shown(percent(c), sign), values[c].mark) for c in self.columns]
            name = row.replace("|", "\\|")
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {max(v.seeds for v in values.values())} |")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Each run's values, for whoever computes something else from them."""
        return {"suite": self.suite.model_dump(mode="json"), "guidance": self.guidance, "runs": list(self.raw)}


def marked(shown: str, mark: str) -> str:
    return f"**{shown}**" if mark in ("best", "clear") else f"{shown} ≈" if mark == "close" else shown


def percent(metric: str) -> bool:
    """Whether a metric is shown as a share."""
    return metric.partition("/")[0] in ("verifier", "quality")


def collect(suite: Suite, cells: Sequence[Cell]) -> Comparison:
    """Read what the runs that have ended measured. Raises ValueError where none has."""
    ended = [cell for cell in cells if done(cell)]
    if not ended:
        raise ValueError(f"no run of {suite.name} has ended, so there is nothing to show; run it first")
    missing = [f"{cell.row}, seed {cell.seed}" for cell in cells if cell not in ended]
    evaluation = ended[0].load().evaluation
    scale = f"{suite.guidance or [*evaluation.guidance, *evaluation.guidance_ends][0]:g}"
    found = {id(cell): _read(cell, scale) for cell in ended}
    missing += [
        f"{c.row}, seed {c.seed} (ended before guidance {scale} was measured)" for c in ended if not found[id(c)]
    ]
    ended = [cell for cell in ended if found[id(cell)]]
    if not ended:
        raise ValueError(
            f"no run of {suite.name} was measured at guidance {scale}; write another guidance: in the suite"
        )
    raw = [line for cell in ended if (line := found[id(cell)])]
    measured = list(dict.fromkeys(name for line in raw for name in line["after"]))
    for key, names in (("columns", suite.columns), ("lower", suite.lower)):
        if unknown := [name for name in names if name not in measured]:
            raise ValueError(f"{key}: {unknown[0]!r} was not measured; write one of {', '.join(measured)}")
    columns = suite.columns or [name for name in measured if "/" not in name]
    seeds: dict[str, dict[int, dict[str, float]]] = {BASE: {}}
    for line in raw:
        seeds[BASE].setdefault(line["seed"], {}).update(line["before"])  # rows may measure different things
        seeds.setdefault(line["row"], {})[line["seed"]] = line["after"]
    if suite.reference not in (None, *seeds):
        missing.append(f"{suite.reference}, the reference, so there are no differences from it")
    values = {row: {c: _value(found, c) for c in columns} for row, found in seeds.items()}
    values[BASE] = {c: _once(value) for c, value in values[BASE].items()}
    for column in columns:
        _mark(values, seeds, column, column in suite.lower)
    curves = {row: _curve([cell for cell in ended if cell.row == row], scale) for row in seeds if row != BASE}
    return Comparison(suite, columns, values, _differences(suite, seeds, columns), curves, missing, scale, raw)


def _read(cell: Cell, scale: str) -> dict[str, Any] | None:
    """A run's means before and after, and what it cost; None for one that a guard ended before it was measured."""
    file = cell.folder / "summary.json"
    summary = read_json(file, str(file))
    if scale not in summary.get("guidance", {}):
        return None
    part = summary["guidance"][scale]
    means = {end: {n: mean_of(v) for n, v in part[end].items()} for end in ("before", "after")}
    shape, steps = Run.open(cell.folder).config.data.shape, summary["steps"]
    cost = {"images": steps * shape.batch, "seconds": summary["seconds"], "weights_sha256": summary["weights_sha256"]}
    finite = {end: {n: v for n, v in found.items() if v is not None} for end, found in means.items()}
    return {"row": cell.row, "seed": cell.seed, "steps": steps, **cost, **finite}


def _value(found: Mapping[int, Mapping[str, float]], column: str) -> Value:
    values = np.array([line[column] for line in found.values() if column in line])
    return Value(float(values.mean()) if len(values) else float("nan"), half_width(values), len(values))


def _once(value: Value) -> Value:
    """The base's value: where it is the same in every seed it was measured once, and has no interval over seeds."""
    return value if value.half is None or value.half > 1e-9 else replace(value, half=None)


def half_width(values: np.ndarray) -> float | None:
    """Half of the 95 % interval of a mean over seeds: t[n−1]·s/√n; None for fewer than two."""
    from scipy.stats import t

    n = len(values)
    return None if n < 2 else float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))


def _differences(
    suite: Suite, seeds: Mapping[str, Mapping[int, Mapping[str, float]]], columns: Sequence[str]
) -> dict[str, dict[str, Value]]:
    """Row -> column -> the mean of the differences from the reference in the seeds that both have."""
    found: dict[str, dict[str, Value]] = {}
    for row in seeds if suite.reference in seeds else ():
        if row not in (BASE, suite.reference):
            found[row] = {c: _difference(seeds[row], seeds[str(suite.reference)], c) for c in columns}
    return found


def _difference(
    row: Mapping[int, Mapping[str, float]], reference: Mapping[int, Mapping[str, float]], column: str
) -> Value:
    """The row minus the reference in the seeds that both have."""
    common = [s for s in row if s in reference and column in row[s] and column in reference[s]]
    delta = np.array([row[s][column] - reference[s][column] for s in common])
    mean, half = float(delta.mean()) if common else float("nan"), half_width(delta)
    return Value(mean, half, len(common), "clear" if half is not None and abs(mean) > half else "")


def _mark(
    values: dict[str, dict[str, Value]],
    seeds: Mapping[str, Mapping[int, Mapping[str, float]]],
    column: str,
    lower: bool,
) -> None:
    """Mark the best of a column and what cannot be told from it; the base is compared, but never marked."""
    rows = [row for row in values if row != BASE and np.isfinite(values[row][column].mean)]
    if not rows:
        return
    best = (min if lower else max)(rows, key=lambda row: values[row][column].mean)
    for row in rows:
        away = _difference(seeds[row], seeds[best], column)
        close = away.half is not None and not away.mark
        mark = "best" if row == best else "close" if close else ""
        values[row][column] = replace(values[row][column], mark=mark)


def _curve(cells: Sequence[Cell], scale: str) -> Curve:
    """Means over a row's runs after each evaluation that all of them made."""
    tracks = [_track(Run.open(cell.folder), float(scale)) for cell in cells]
    steps = sorted(set.intersection(*(set(track) for track in tracks)))
    names = [n for n, v in tracks[0][steps[0]].items() if isinstance(v, float)] if steps else []
    return Curve(
        steps,
        [float(np.mean([track[step]["images"] for track in tracks])) for step in steps],
        [float(np.mean([track[step]["hours"] for track in tracks])) for step in steps],
        {n: [float(np.mean([track[step].get(n, np.nan) for track in tracks])) for step in steps] for n in names},
    )


def _track(run: Run, scale: float) -> dict[int, dict[str, float]]:
    """Step -> the metrics of its evaluation, images drawn until then, and hours in steps."""
    batch, lines = run.config.data.shape.batch, run.metrics()
    spent = {int(line["step"]): float(line["step_s"]) for line in lines if line["kind"] == "train"}
    found = {}
    for line in lines:
        if line["kind"] == "evaluation" and line.get("guidance") == scale:
            step = int(line["step"])
            hours = sum(seconds for at, seconds in spent.items() if at < step) / 3600
            metrics = {n: v for n, v in line.items() if isinstance(v, float) and n != "guidance"}
            found[step] = metrics | {"images": float(step * batch), "hours": hours}
    return found
