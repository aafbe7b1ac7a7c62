"""Prompt files, and which prompts a step draws."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from flowbp_ray import prompts


def test_prompt_files_of_all_kinds_read_the_same(tmp_path: Path) -> None:
    texts = ["a cat", "a dog on a boat"]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t, "skill": "x"}) + "\n" for t in texts))
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    for suffix in ("txt", "jsonl", "parquet"):
        assert [r.text for r in prompts.load(str(tmp_path / f"p.{suffix}"))] == texts
    assert prompts.load(str(tmp_path / "p.jsonl"))[0].extra == {"skill": "x"}
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="entry 1: no text under 'prompt'"):
        prompts.load(str(tmp_path / "bad.jsonl"))


def test_an_epoch_holds_every_prompt_once_and_position_is_the_step() -> None:
    seen = [i for step in range(10) for i in prompts.ids_of_step(25, 5, step, seed=1)]
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25))
    assert seen[:25] != seen[25:]
    assert prompts.ids_of_step(25, 5, 7, seed=1) == seen[35:40]
    larger = prompts.ids_of_step(3, 7, 0, seed=3)  # more prompts a step than the file holds
    assert sorted(larger[:3]) == sorted(larger[3:6]) == [0, 1, 2] and len(larger) == 7
