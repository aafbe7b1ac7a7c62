"""The three committed prompt files, one JSON object a line: {"prompt": ..., "skill": ..., "claim": ...}."""

from __future__ import annotations

import json
from pathlib import Path

from .world import Prompt

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "dev", "heldout")


def model_dir() -> Path:
    """The folder of the embedded models, laid out as a diffusers StableDiffusion3Pipeline."""
    return DATA / "model"


def prompt_file(split: str) -> Path:
    """The file with the prompts of "train", "dev" or "heldout". Raises ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return DATA / "prompts" / f"{split}.jsonl"


def load_prompts(split: str) -> list[Prompt]:
    """All prompts of a split, in file order."""
    with prompt_file(split).open(encoding="utf-8") as lines:
        return [Prompt.from_json(json.loads(line)) for line in lines]
