"""summary.json and the table before → after: what a run reports at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowbp_ray.artifacts.card_phrases import caution_of_distillation
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.guard import HackingVerdict
from flowbp_ray.evaluation.estimates import NONE, Evaluation
from flowbp_ray.run.folder import Run

Evaluations = Mapping[int, Mapping[float, Evaluation]]


def summarise(
    config: RunConfig,
    run: Run,
    evaluations: Evaluations,
    seconds: float,
    digest: str,
    verdict: HackingVerdict | None = None,
) -> dict[str, Any]:
    """What summary.json holds: before, after and paired change per guidance; throughput; bytes; the weights' digest.

    verdict: of a guard that ended the run. Where the guard rolled back, "after" is the evaluation of the step that it
    went back to. `caution` is there only where guidance was distilled.
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
    if caution := caution_of_distillation(config):
        summary["caution"] = caution
    if verdict is not None:
        summary["guard"] = asdict(verdict) | {"line": verdict.describe()}
    if evaluations:
        first, last = min(evaluations), max(evaluations)
        if verdict is not None and verdict.action == "rollback":
            last = verdict.best
        # a run that the guard ended was not measured at guidance_ends after it
        both = [g for g in evaluations[first] if g in evaluations[last]]
        summary["guidance"] = {f"{g:g}": compare(evaluations[first][g], evaluations[last][g]) for g in both}
    return summary


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """before, after and the paired change by metric, with intervals, of the metrics that both evaluations have.

    A trained term that is the exact verifier has the verifier's values, and is left out beside it.
    """
    # a judge's answers may be missing in one of them
    both = {n for n in before.values.keys() & after.values.keys() if not (before.repeats(n) and after.repeats(n))}
    before, after = (replace(e, values={n: v for n, v in e.values.items() if n in both}) for e in (before, after))
    change = {name: asdict(estimate) for name, estimate in before.changes(after).items()}
    return {"before": before.as_dict(), "after": after.as_dict(), "change": change}


def results_table(summary: Mapping[str, Any], guidance: str) -> Table:
    """A table of before → after with 95 % intervals, one row per metric."""
    result = Table(title=f"held-out prompts, guidance {guidance} (95 % intervals)", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("metric", "before", "after", "change"):
        first = column == "metric"
        result.add_column(column, justify="left" if first else "right", min_width=26 if first else None)
    for name, *means, change in table_rows(summary["guidance"][guidance]):
        result.add_row(name, *(mean.partition(" [")[0] for mean in means), change)  # 80 columns hold one interval
    return result


def table_rows(part: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, change) as text, of what `compare` returns."""
    result = []
    for name, before in part["before"].items():
        if name not in part["after"]:  # by skill there are verdicts only, and one evaluation may have no others
            continue
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


def print_summary(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    """Print the tables of a finished run, and where its pictures are. summary: what `summarise` returns."""
    for guidance in summary.get("guidance", {}):
        console.print(results_table(summary, guidance))
    if "caution" in summary:
        console.print(escape(summary["caution"]))
    if "guard" in summary:
        console.print(escape(f"ended by the guard at {summary['guard']['line']}"))
    satisfied = summary.get("without_gradient", {})
    if any(satisfied.values()):
        shares = ", ".join(f"{share:.0%} of {name}" for name, share in satisfied.items())
        console.print(f"samples at or above the clip at the end, which give no gradient: {shares}")
    console.print(f"{summary['steps']} steps in {summary['seconds']} s; summary: {folder / 'summary.json'}")
    for picture in [*sorted((folder / "images").glob("*.png")), folder / "curves.png"]:
        console.print(f"picture: {picture}")
