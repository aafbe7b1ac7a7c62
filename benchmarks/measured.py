"""A run in one process, without Ray, and its held-out pictures at several guidances: what studies share."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray import prompts
from flowbp_ray.config import loading
from flowbp_ray.evaluation.estimates import Evaluation, measure
from flowbp_ray.local import LocalLoop, encode
from flowbp_ray.messages import Item, Version

AT_ONCE = 45
ALONE = ["learners.engine=torch", "learners.count=1", "samplers.count=1", "rewards.count=1", "tracking.wandb=false"]


def parser_of(description: str | None, runs: Iterable[str]) -> argparse.ArgumentParser:
    """The options that studies of the embedded model share: --runs, --seeds, --split and --table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(runs), default=list(runs))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--split", choices=["dev", "heldout"], default="heldout")
    parser.add_argument("--table", type=Path, help="file with lines that this command printed")
    return parser


def shows_table(options: argparse.Namespace, table: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether --table asked for the Markdown of lines in a file, which is then printed."""
    if options.table is None:
        return False
    print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
    return True


class Measured:
    """A loop with the prompts of a split, drawn always from the same noise."""

    def __init__(self, name: str, seed: int, split: str, overrides: Sequence[str] = ()) -> None:
        over = [f"seed={seed}", f"plan_seed={seed + 1000}", f"evaluation.prompts=shapes:{split}", *overrides]
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

    def evaluate(self, guidance: float, pictures: int = 1) -> Drawn:
        """`pictures` held-out pictures of each prompt, of the average of the weights."""
        sampler, trained = self.loop.sampler, self.loop.sampler.embeddings
        published = list(self.loop.learner.publish(ema=True))
        sampler.embeddings, parts = self.embeddings, []
        rows = len(self.records) * pictures
        for start in range(0, rows, AT_ONCE):
            item = self._item(range(start, min(start + AT_ONCE, rows)), guidance)
            texts = [self.records[i].text for i in item.prompt_ids]
            parts.append(self.loop.scorer.evaluate(item, texts, sampler.sample(item, lambda: published)))
        sampler.embeddings, sampler.version = trained, None
        scores = {name: [v for part in parts for v in part.scores[name]] for name in parts[0].scores}
        drawn = np.array([fine for part in parts for fine in part.drawn])
        images = np.concatenate([part.images for part in parts])
        return Drawn(images, measure(images, self.records * pictures, scores, drawn), pictures)

    def _item(self, rows: range, guidance: float) -> Item:
        settings = self.config.evaluation
        steps = settings.num_steps or self.config.backbone.num_steps
        version, ids = Version(1, self.config.steps, True), tuple(row % len(self.records) for row in rows)
        return Item("held out", 0, 0, ids, tuple(rows), (), settings.seed, steps, guidance, version)


class Drawn:
    """Pictures uint8 [pictures * prompts, 64, 64, 3], prompt by prompt within each round, and what was measured."""

    def __init__(self, images: np.ndarray, measured: Evaluation, pictures: int) -> None:
        self.images, self.measured, self.pictures = images, measured, pictures

    def by_prompt(self) -> dict[str, np.ndarray]:
        """Each metric's mean over a prompt's pictures [prompts], and how far apart these are."""
        found = {name: v.reshape(self.pictures, -1).mean(0) for name, v in self.measured.values.items()}
        return found | ({"diversity": self._diversity()} if self.pictures > 1 else {})

    def scalars(self) -> dict[str, float]:
        """Metrics of all pictures together."""
        return dict(self.measured.scalars)

    def _diversity(self) -> np.ndarray:
        """Root mean square of the pixels' difference (of 255), over the pairs of a prompt's pictures [prompts]."""
        rounds = self.images.reshape(self.pictures, -1, *self.images.shape[1:]).astype(np.float32)
        pairs = [(i, j) for i in range(self.pictures) for j in range(i)]
        return np.mean([np.sqrt(((rounds[i] - rounds[j]) ** 2).mean((1, 2, 3))) for i, j in pairs], axis=0)
