"""make demo: train the embedded model by reward backpropagation over Ray, and say honestly what came of it.

Exit code 1 if quality or the verifier's pass rate did not rise beyond its 95 % interval on held-out prompts. With
--readme the picture and the table of README.md are written from the run.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowbp_ray.artifacts.html_report import write_report
from flowbp_ray.artifacts.report import print_summary
from flowbp_ray.cli import console
from flowbp_ray.config import loading
from flowbp_ray.driver import train
from flowbp_ray.observability.progress import Progress
from flowbp_ray.utils.console import guarded

ROOT = Path(__file__).resolve().parents[1]
SHARES = ("quality", "verifier")  # in percent
ROWS = {
    "quality": "quality, by an exact meter that nothing is trained on",
    "verifier": "the verifier accepts",
    "shapes_preference": "preference, trained on",
    "shapes_preference_heldout": "preference, another model, held out",
}


def shown(metric: str, value: float, sign: bool = False) -> str:
    """`43.6 %`, `+5.0 points` or `0.517`."""
    if metric in SHARES:
        return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f} %"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def changed(metric: str, change: Mapping[str, float]) -> str:
    """`+5.0 (0.5 to 9.5)`: the paired change and its 95 % interval."""
    mean, low, high = (shown(metric, change[k], sign=True) for k in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def readme_table(summary: Mapping[str, Any]) -> str:
    """The table of README.md: held-out prompts before and after without guidance, and the base at guidance 3."""
    plain, guided = (summary["guidance"][f"{g:g}"] for g in (1.0, 3.0))
    lines = [
        "| | base | tuned | change (95 % interval) | base at guidance 3, twice the cost |",
        "|---|---|---|---|---|",
    ]
    for metric, name in ROWS.items():
        cells = [shown(metric, plain[when][metric]["mean"]) for when in ("before", "after")]
        cells += [changed(metric, plain["change"][metric]), shown(metric, guided["before"][metric]["mean"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    before, after, other = (part["colour_entropy_bits"] for part in (plain["before"], plain["after"], guided["before"]))
    lines.append(f"| variety of colours, bits | {before:.2f} | {after:.2f} | {after - before:+.2f} | {other:.2f} |")
    return "\n".join(lines)


def write_readme(folder: Path, summary: Mapping[str, Any]) -> None:
    """Put the run's picture and table into README.md and docs/."""
    shutil.copy(folder / "images" / "before_above_after_guidance_1.png", ROOT / "docs" / "before_above_after.png")
    readme, block = ROOT / "README.md", f"<!-- demo -->\n{readme_table(summary)}\n<!-- /demo -->"
    text, found = re.subn(r"<!-- demo -->.*<!-- /demo -->", lambda _: block, readme.read_text(), flags=re.DOTALL)
    if not found:
        raise ValueError("README.md has no <!-- demo --> … <!-- /demo --> block to write the table into")
    readme.write_text(text)


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if argument != "--readme"]
    config = loading.load("shapes_demo", overrides)
    run, summary = train(config, Progress(config.steps, console=console))
    print_summary(console, run.folder, summary)
    page = write_report(run.folder)
    plain, guided = (summary["guidance"][f"{g:g}"] for g in (1.0, 3.0))
    for metric in SHARES:
        change, tuned = plain["change"][metric], plain["after"][metric]["mean"]
        base = guided["before"][metric]["mean"]
        side = "above" if tuned > base else "not above"
        console.print(
            f"{metric} without guidance: {changed(metric, change)} points, to {shown(metric, tuned)}; that is {side} "
            f"the base at guidance 3 ({shown(metric, base)}), which costs twice as much to draw"
        )
    console.print(f"look at held-out prompts, base above tuned: {run.images / 'before_above_after_guidance_1.png'}")
    console.print(f"all of it on one page, before and after with a slider: {page.path} (open it in a browser)")
    if "--readme" in sys.argv[1:]:
        write_readme(run.folder, summary)
    if missed := [metric for metric in SHARES if plain["change"][metric]["low"] <= 0]:
        print(f"demo: {' and '.join(missed)} did not rise beyond the interval", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    guarded(main)
