"""What a run leaves for a person: picture grids, curves, and the table before → after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control import guard
from flowbp_ray.control.guard import HackingVerdict
from flowbp_ray.evaluation.estimates import NONE, Evaluation, paired
from flowbp_ray.run.folder import Run

Evaluations = Mapping[int, Mapping[float, Evaluation]]


def curves(run: Run) -> Path | None:
    """curves.png: the training reward per step, what evaluations measured, and what judges said of their pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    lines = run.metrics()
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        return None
    config = run.config
    panels = [
        ("evaluation", "rewards on held-out prompts", [reward.name for reward in config.rewards.all]),
        ("evaluation", "share that the exact verifier accepts", ["verifier"]),
        ("judge", "judges on held-out prompts", config.judged),
    ]
    panels = [(kind, title, names) for kind, title, names in panels if _have(lines, kind, names)]
    width = 4.4 * (1 + len(panels))
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(width, 3.6), layout="constrained", squeeze=False)
    left, *others = axes[0]
    for key in (k for k in train[0] if k.startswith("reward/")):
        left.plot([t["step"] + 1 for t in train], [t[key] for t in train], lw=1, label=key.removeprefix("reward/"))
    left.set(title="reward of the training batches", xlabel="step")
    left.legend()
    stopped = guard.read(run)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis, (kind, title, names) in zip(others, panels, strict=True):
        _held_out(axis, [line for line in lines if line["kind"] == kind], names)
        axis.set(title=title, xlabel="step")
        if stopped:
            axis.axvline(stopped["step"], color="red", ls=":", label="ended by the guard")
            axis.axvline(stopped["best"], color="grey", ls=":", label="best by what is guarded")
        if axis.lines:
            axis.legend(fontsize=8)
    path = run.folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _have(lines: Sequence[Mapping[str, Any]], kind: str, names: Sequence[str]) -> bool:
    return any(line["kind"] == kind and name in line for line in lines for name in names)


def _held_out(axis: Any, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One curve per metric and guidance; what has no finite value at a step is a gap."""
    for guidance in sorted({line["guidance"] for line in lines}):
        for name in names:
            mine = [line for line in lines if line["guidance"] == guidance and name in line]
            values = [np.nan if line[name] is None else line[name] for line in mine]
            if mine:
                axis.plot([m["step"] for m in mine], values, marker="o", label=f"{name}, guidance {guidance:g}")


def summarise(
    config: RunConfig,
    run: Run,
    evaluations: Evaluations,
    seconds: float,
    digest: str,
    verdict: HackingVerdict | None = None,
) -> dict[str, Any]:
    """summary.json: before, after and the paired change per guidance; throughput; bytes; the digest of the weights.

    verdict: of a guard that ended the run; after it went back, "after" is the evaluation of the step it went back to.
    """
    train = [line for line in run.metrics() if line["kind"] == "train"]
    summary: dict[str, Any] = {
        "run": str(run.folder),
        "method": config.method,
        "steps": config.steps if verdict is None else verdict.step,
        "seconds": round(seconds, 1),
        "weights_sha256": digest,
    }
    if train:
        keys = [key for key in train[0] if key in ("images_per_s", "step_s") or key.endswith("_bytes_per_image")]
        for key in keys:
            summary[f"median_{key}"] = float(np.median([t[key] for t in train]))
        summary["retries"] = train[-1]["retries"]
        tail = train[-max(1, len(train) // 10) :]
        satisfied = [key for key in train[0] if key.startswith("clipped/")]
        summary["without_gradient"] = {k.removeprefix("clipped/"): _mean([t[k] for t in tail]) for k in satisfied}
    if verdict is not None:
        summary["guard"] = asdict(verdict) | {"line": verdict.describe()}
    if evaluations:
        first, last = min(evaluations), max(evaluations)
        if verdict is not None and verdict.action == "rollback":
            last = verdict.best
        summary["guidance"] = {
            f"{g:g}": compared(evaluations[first][g], evaluations[last][g]) for g in evaluations[first]
        }
    return summary


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def compared(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """before, after and the paired change by metric, with their intervals. Only what both have: a judge may be late."""
    both = before.values.keys() & after.values.keys()
    before, after = (replace(e, values={n: v for n, v in e.values.items() if n in both}) for e in (before, after))
    change = {
        name: asdict(paired(v, after.values[name]))
        for name, v in before.values.items()
        if np.isfinite(v - after.values[name]).any()
    }
    return {"before": before.as_dict(), "after": after.as_dict(), "change": change}


def table(summary: Mapping[str, Any], guidance: str) -> Table:
    """before → after with 95 % intervals, one row per metric."""
    result = Table(title=f"held-out prompts, guidance {guidance} (95 % intervals)")
    for column in ("metric", "before", "after", "change"):
        first = column == "metric"
        result.add_column(column, justify="left" if first else "right", min_width=26 if first else None)
    for row in rows(summary["guidance"][guidance]):
        result.add_row(*row)
    return result


def rows(part: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, change) as text, of what `compared` gives."""
    result = []
    for name, before in part["before"].items():
        after, change = part["after"][name], part["change"].get(name)
        if not isinstance(before, Mapping):
            change = "" if None in (before, after) else f"{after - before:+.2f}"
            shown = [NONE if value is None else f"{value:.2f}" for value in (before, after)]
            result.append((name.replace("_", " "), *shown, change))
            continue
        form = _percent if name.startswith("verifier") else _plain
        if change is None:
            both = None not in (before["mean"], after["mean"])
            change = {"mean": after["mean"] - before["mean"] if both else None}
        result.append((name, form(before), form(after), form(change, sign=True)))
    return result


def _percent(e: Mapping[str, Any], sign: bool = False) -> str:
    if e["mean"] is None:
        return NONE
    mean = f"{100 * e['mean']:+.1f}" if sign else f"{100 * e['mean']:.1f} %"
    return mean + (f" [{100 * e['low']:.1f}, {100 * e['high']:.1f}]" if e.get("low") is not None else "")


def _plain(e: Mapping[str, Any], sign: bool = False) -> str:
    if e["mean"] is None:
        return NONE
    mean = f"{e['mean']:+.4f}" if sign else f"{e['mean']:.4f}"
    return mean + (f" [{e['low']:.4f}, {e['high']:.4f}]" if e.get("low") is not None else "")


def show(console: Console, folder: Path, summary: dict[str, object]) -> None:
    """The tables of a finished run, and where its pictures are."""
    from flowbp_ray.artifacts.report import table

    for guidance in summary.get("guidance", {}):  # type: ignore[attr-defined]
        console.print(table(summary, guidance))
    if "guard" in summary:
        console.print(escape(f"ended by the guard at {summary['guard']['line']}"))  # type: ignore[index]
    satisfied = summary.get("without_gradient", {})
    if any(satisfied.values()):  # type: ignore[attr-defined]
        shares = ", ".join(f"{share:.0%} of {name}" for name, share in satisfied.items())  # type: ignore[attr-defined]
        console.print(f"samples at or above the clip at the end, which give no gradient: {shares}")
    console.print(f"{summary['steps']} steps in {summary['seconds']} s; summary: {folder / 'summary.json'}")
    for picture in [*sorted((folder / "images").glob("*.png")), folder / "curves.png"]:
        console.print(f"picture: {picture}")
