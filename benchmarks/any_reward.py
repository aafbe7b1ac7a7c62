"""python -m benchmarks.any_reward: what is learned from a reward without gradient, beside one with it and beside both.

Trains shapes_nft, shapes_demo and shapes_both in one process on one thread, without Ray, and measures held-out prompts
with the noise of all evaluations, before and after, without guidance and with 3. Prints a JSON line per run, or with
--table the Markdown of docs/any-reward.md from such lines. CPU seconds are those of the steps, without evaluations.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowbp_ray import prompts
from flowbp_ray.config import loading
from flowbp_ray.evaluation.estimates import measure
from flowbp_ray.local import LocalLoop, encode
from flowbp_ray.messages import Item, Version

RUNS = ("shapes_nft", "shapes_demo", "shapes_both")
GUIDANCE = (1.0, 3.0)
SHOWN = ("verifier", "shapes_clip_heldout", "colour_entropy_bits")
AT_ONCE = 45
ALONE = ["learners.engine=torch", "learners.count=1", "samplers.count=1", "rewards.count=1", "tracking.wandb=false"]


class Measured:
    """A loop with the held-out prompts of its configuration."""

    def __init__(self, name: str, seed: int, split: str) -> None:
        over = [f"seed={seed}", f"plan_seed={seed + 1000}", f"evaluation.prompts=shapes:{split}"]
        self.config = loading.load(name, [*ALONE, *over])
        self.loop = LocalLoop(self.config)
        self.records = prompts.load(f"shapes:{split}")
        self.embeddings = encode(self.config, [record.text for record in self.records])

    def train(self) -> float:
        """Run all steps; return their CPU seconds."""
        began = time.process_time()
        for step in range(self.config.steps):
            self.loop.step(step)
        return time.process_time() - began

    def evaluate(self) -> dict[str, dict[str, float | None]]:
        """Means by guidance, of the average of the weights."""
        sampler, trained = self.loop.sampler, self.loop.sampler.embeddings
        published = list(self.loop.learner.publish(ema=True))
        sampler.embeddings, found = self.embeddings, {}
        for guidance in GUIDANCE:
            parts = []
            for start in range(0, len(self.records), AT_ONCE):
                item = self._item(range(start, min(start + AT_ONCE, len(self.records))), guidance)
                texts = [self.records[i].text for i in item.prompt_ids]
                parts.append(self.loop.scorer.evaluate(item, texts, sampler.sample(item, lambda: published)))
            scores = {name: [v for part in parts for v in part.scores[name]] for name in parts[0].scores}
            drawn = np.array([fine for part in parts for fine in part.drawn])
            means = measure(np.concatenate([part.images for part in parts]), self.records, scores, drawn).means()
            found[f"{guidance:g}"] = {name: means[name] for name in SHOWN}
        sampler.embeddings, sampler.version = trained, None
        return found

    def _item(self, rows: range, guidance: float) -> Item:
        settings = self.config.evaluation
        steps = settings.num_steps or self.config.backbone.num_steps
        version = Version(1, self.config.steps, True)
        return Item("held out", 0, 0, tuple(rows), tuple(rows), (), settings.seed, steps, guidance, version)


def run(name: str, seed: int, split: str) -> dict[str, Any]:
    measured = Measured(name, seed, split)
    before = measured.evaluate()
    seconds = measured.train()
    shape = measured.config.data.shape
    images = measured.config.steps * shape.batch
    return {"run": name, "seed": seed, "split": split, "images": images, "cpu_s": round(seconds, 1)} | {
        "before": before,
        "after": measured.evaluate(),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--split", choices=["dev", "heldout"], default="heldout")
    parser.add_argument("--table", type=Path, help="file with lines that this command printed")
    options = parser.parse_args()
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.runs:
            print(json.dumps(run(name, seed, options.split)), flush=True)


if __name__ == "__main__":
    main()
