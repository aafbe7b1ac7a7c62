"""Stage `prompts`: write the three prompt files, every prompt once, held-out combinations in dev and heldout only."""

from __future__ import annotations

import argparse
import json

import numpy as np

from flowbp_ray.shapes.prompts import prompt_file
from flowbp_ray.shapes.sampling import sample_prompt
from flowbp_ray.shapes.world import SKILLS, Prompt

SEED = 11
TRAIN_PER_SKILL = 480
HELD_OUT_PER_SKILL = 60
PATIENCE = 20000  # draws without a new prompt after which a skill has been exhausted


def _distinct(rng: np.random.Generator, split: str, skill: str, wanted: int) -> list[Prompt]:
    """Up to `wanted` different prompts of a skill."""
    found: dict[str, Prompt] = {}
    idle = 0
    while len(found) < wanted and idle < PATIENCE:
        prompt = sample_prompt(rng, split, skill)
        idle = idle + 1 if prompt.text in found else 0
        found.setdefault(prompt.text, prompt)
    return list(found.values())


def _write(split: str, prompts: list[Prompt]) -> None:
    path = prompt_file(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(p.to_json()) + "\n" for p in prompts), encoding="utf-8")
    print(f"{split}: {len(prompts)} prompts")


def main(args: argparse.Namespace) -> None:
    """Write train.jsonl, dev.jsonl and heldout.jsonl."""
    rng = np.random.default_rng(SEED)
    train = [p for skill in SKILLS for p in _distinct(rng, "train", skill, TRAIN_PER_SKILL)]
    dev: list[Prompt] = []
    heldout: list[Prompt] = []
    for skill in SKILLS:
        both = _distinct(rng, "heldout", skill, 2 * HELD_OUT_PER_SKILL)
        if len(both) < 2 * HELD_OUT_PER_SKILL:
            raise ValueError(f"the grammar has only {len(both)} held-out prompts of skill {skill}")
        heldout += both[:HELD_OUT_PER_SKILL]
        dev += both[HELD_OUT_PER_SKILL:]
    order = rng.permutation(len(train))
    _write("train", [train[i] for i in order])
    _write("dev", dev)
    _write("heldout", heldout)
