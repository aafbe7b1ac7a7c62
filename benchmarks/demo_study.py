"""python -m benchmarks.demo_study: is the demo's model better than the base at any guidance, and whose doing is it.

Trains shapes_demo and its control (the same run with rewards of next to no weight, which distils guidance and nothing
else) in one process on one thread, and draws held-out prompts from the same noise before and after: two pictures of
each without guidance, one at each other guidance (the control without guidance only). Prints a JSON line per model with
each prompt's values, or with --table the Markdown of docs/demo.md from such lines. Settings were chosen on shapes:dev.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from benchmarks.measured import Measured, parser_of, shows_table
from flowbp_ray.evaluation.estimates import Estimate, paired_difference

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)
CONTROL = ["rewards.terms.0.weight=1e-6", "rewards.terms.1.weight=1e-6"]
RUNS: dict[str, list[str]] = {"base": [], "tuned": [], "control": CONTROL}
SHOWN = ("quality", "verifier", "shapes_preference", "shapes_preference_heldout", "diversity")
PERCENT = ("quality", "verifier")


def run(name: str, config: str, seed: int, split: str, overrides: list[str]) -> dict[str, Any]:
    """Train one of RUNS and measure it at every guidance."""
    made = Measured(config, seed, split, [*overrides, *RUNS[name]])
    seconds = made.train() if name != "base" else 0.0
    line: dict[str, Any] = {"run": name, "seed": seed, "split": split, "cpu_s": round(seconds, 1)}
    for guidance in GUIDANCE[:1] if name == "control" else GUIDANCE:
        drawn = made.evaluate(guidance, pictures=2 if guidance == 1 else 1)
        values = {n: [round(float(v), 4) for v in drawn.by_prompt()[n]] for n in SHOWN if n in drawn.by_prompt()}
        line[f"{guidance:g}"] = values | {name: round(value, 4) for name, value in drawn.scalars().items()}
    return line


def mean(line: dict[str, Any], guidance: str, metric: str) -> float:
    return float(np.nanmean(line[guidance][metric]))


def best(line: dict[str, Any], metric: str) -> str:
    """The guidance at which a model does best by a metric; without guidance for one that is measured only there."""
    if metric == "diversity":
        return "1"
    return max((f"{g:g}" for g in GUIDANCE if f"{g:g}" in line), key=lambda g: mean(line, g, metric))


def difference(one: tuple[dict[str, Any], str], other: tuple[dict[str, Any], str], metric: str) -> Estimate:
    """Mean and interval of (model, guidance) `one` less `other`, prompt by prompt."""
    return paired_difference(np.array(other[0][other[1]][metric]), np.array(one[0][one[1]][metric]))


def shown(found: Estimate, metric: str) -> str:
    """`+12.3 (9.1 to 15.4)`, in points where the metric is a share."""
    factor, digits = (100, 1) if metric in PERCENT else (1, 3)
    assert found.mean is not None and found.low is not None and found.high is not None
    return f"{factor * found.mean:+.{digits}f} ({factor * found.low:+.{digits}f} to {factor * found.high:+.{digits}f})"


def table(lines: list[dict[str, Any]]) -> str:
    """All means by guidance, then the comparisons, for each seed."""
    base = next(line for line in lines if line["run"] == "base")
    rows = ["| model | seed | guidance | " + " | ".join((*SHOWN, "colour entropy")) + " |", "|" + "---|" * 9]
    for line in lines:
        for guidance in (f"{g:g}" for g in GUIDANCE if f"{g:g}" in line):
            cells = [f"{mean(line, guidance, m):.3f}" if m in line[guidance] else "" for m in SHOWN]
            entropy = line[guidance]["colour_entropy_bits"]
            rows.append(f"| {line['run']} | {line['seed']} | {guidance} | " + " | ".join(cells) + f" | {entropy:.2f} |")
    rows += ["", "| seed | what | " + " | ".join(SHOWN) + " |", "|" + "---|" * (len(SHOWN) + 2)]
    for tuned in (line for line in lines if line["run"] == "tuned"):
        control = [line for line in lines if (line["run"], line["seed"]) == ("control", tuned["seed"])]
        for what, pair in _pairs(base, tuned, control[0] if control else None).items():
            cells = []
            for metric in SHOWN:
                one, other = pair(metric)
                there = all(metric in line[guidance] for line, guidance in (one, other))
                cells.append(shown(difference(one, other, metric), metric) if there else "")
            rows.append(f"| {tuned['seed']} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _pairs(base: dict[str, Any], tuned: dict[str, Any], control: dict[str, Any] | None) -> dict[str, Any]:
    """What is compared, as functions of the metric that return two (model, guidance)."""
    found: dict[str, Any] = {
        "tuned less base, both without guidance": lambda m: ((tuned, "1"), (base, "1")),
        "tuned less base, each at its best guidance": lambda m: ((tuned, best(tuned, m)), (base, best(base, m))),
        "tuned without guidance less base at 3": lambda m: ((tuned, "1"), (base, "3")),
    }
    if control is not None:
        found["distillation: control less base, without guidance"] = lambda m: ((control, "1"), (base, "1"))
        found["the rewards: tuned less control, without guidance"] = lambda m: ((tuned, "1"), (control, "1"))
    return found


def main() -> None:
    parser = parser_of(__doc__, RUNS)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config", default="shapes_demo")
    options = parser.parse_args()
    if shows_table(options, table):
        return
    torch.set_num_threads(1)
    for name in options.runs:
        for seed in options.seeds[:1] if name == "base" else options.seeds:
            print(json.dumps(run(name, options.config, seed, options.split, options.overrides)), flush=True)


if __name__ == "__main__":
    main()
