"""python -m benchmarks.any_reward: what is learned from a reward without gradient, beside one with it and beside both.

Trains shapes_nft, shapes_both without its term of NFT, and shapes_both, in one process on one thread, without Ray, and
measures held-out prompts with the noise of all evaluations, before and after, without guidance and with 3. Prints a
JSON line per run, or with --table the Markdown of docs/any-reward.md from such lines. CPU seconds are those of the
steps, without evaluations.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch

from benchmarks.measured import Measured, parser_of, shows_table

RUNS: dict[str, tuple[str, list[str]]] = {
    "verdict by NFT": ("shapes_nft", []),
    "preference by FlowBP": ("shapes_both", ["rewards.terms=[{name: shapes_preference}]"]),
    "both": ("shapes_both", []),
}
GUIDANCE = (1.0, 3.0)
SHOWN = ("verifier", "quality", "shapes_preference_heldout", "colour_entropy_bits")


def measured_at(found: Measured) -> dict[str, dict[str, float | None]]:
    """Means by guidance, of the average of the weights."""
    means = {f"{guidance:g}": found.evaluate(guidance).measured.means() for guidance in GUIDANCE}
    return {guidance: {name: each[name] for name in SHOWN} for guidance, each in means.items()}


@functools.cache
def before_training(split: str) -> dict[str, dict[str, float | None]]:
    """Means by guidance of the base, which all runs and seeds begin with, from the noise of all evaluations."""
    return measured_at(Measured(RUNS["both"][0], 0, split))


def run(name: str, seed: int, split: str) -> dict[str, Any]:
    config, overrides = RUNS[name]
    measured = Measured(config, seed, split, overrides)
    before, seconds = before_training(split), measured.train()
    shape = measured.config.data.shape
    images = measured.config.steps * shape.batch
    return {"run": name, "seed": seed, "split": split, "images": images, "cpu_s": round(seconds, 1)} | {
        "before": before,
        "after": measured_at(measured),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Rows of runs: means over the seeds, and the lowest and highest seed."""

    def cell(values: list[float]) -> str:
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    rows = ["| run | guidance | " + " | ".join(SHOWN) + " | images | CPU s |", "|" + "---|" * (len(SHOWN) + 4)]
    for guidance in (f"{g:g}" for g in GUIDANCE):
        base = lines[0]["before"][guidance]
        rows.append(f"| base | {guidance} | " + " | ".join(f"{base[name]:.3f}" for name in SHOWN) + " | | |")
        for name in dict.fromkeys(line["run"] for line in lines):
            mine = [line for line in lines if line["run"] == name]
            cells = [cell([line["after"][guidance][metric] for line in mine]) for metric in SHOWN]
            cost = f"{mine[0]['images']} | {np.mean([line['cpu_s'] for line in mine]):.0f}"
            rows.append(f"| {name} | {guidance} | " + " | ".join(cells) + f" | {cost} |")
    return "\n".join(rows)


def main() -> None:
    parser = parser_of(__doc__, RUNS)
    options = parser.parse_args()
    if shows_table(options, table):
        return
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.runs:
            print(json.dumps(run(name, seed, options.split)), flush=True)


if __name__ == "__main__":
    main()
