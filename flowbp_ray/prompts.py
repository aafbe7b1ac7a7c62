"""Prompts from a file, shuffled in each epoch by the seed. The step determines the position, so there is no state."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils.random import stream


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. extra: the other fields of its line, such as a skill or a claim for the verifier."""

    text: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def skill(self) -> str:
        """The prompt's `skill`, or its `tag` as in GenEval's file, or "". Evaluations are broken down by it."""
        return str(self.extra.get("skill", self.extra.get("tag", "")))


def load(source: str) -> list[PromptRecord]:
    """Read prompts from a .txt (one a line), .jsonl or .parquet file (column `prompt`), or "shapes:<split>".

    Raises ValueError, with the file's name, if the file is missing or empty, or has no prompt column.
    """
    path = _resolve(source)
    if not path.is_file():
        raise ValueError(f"prompts file {source} does not exist; write the path of a .txt, .jsonl or .parquet file")
    if path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text().splitlines()]
        rows: list[dict[str, Any]] = [{"prompt": line} for line in lines if line]
    elif path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"prompts file {source} is not JSON lines: {error}") from error
    elif path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        rows = parquet.read_table(path).to_pylist()
    else:
        raise ValueError(f"prompts file {source} ends in {path.suffix!r}; write a .txt, .jsonl or .parquet file")
    if not rows:
        raise ValueError(f"prompts file {source} holds no prompt")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            found = sorted(row) if isinstance(row, dict) else row
            raise ValueError(f"prompts file {source}, entry {number}: no text under 'prompt', only {found}")
    return [PromptRecord(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for row in rows]


def _resolve(source: str) -> Path:
    if source.startswith("shapes:"):
        from flowbp_ray.shapes import prompt_file

        return Path(prompt_file(source.removeprefix("shapes:")))
    return Path(source)


def ids_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """The prompt ids of a step. Each epoch is a new permutation of 0…count−1; a step may span two epochs."""
    ids: list[int] = []
    position = step * per_step
    while len(ids) < per_step:
        epoch, offset = divmod(position, count)
        order = stream(seed, "prompt", epoch).permutation(count)
        taken = order[offset : offset + per_step - len(ids)]
        ids += [int(i) for i in taken]
        position += len(taken)
    return ids


def read_prompts(config: RunConfig) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Read the training and the evaluation prompts of a run."""
    train, held_out = load(config.data.prompts), config.evaluation.prompts
    return train, load(held_out)[: config.evaluation.limit] if held_out else []
