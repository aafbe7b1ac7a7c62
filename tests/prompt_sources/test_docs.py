"""docs/prompts.md: its YAML is a configuration's, and the line that it shows is what a run prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flowbp_ray.config import loading
from flowbp_ray.preflight import describe_prompts, drawn_texts
from flowbp_ray.prompt_sources.readers import READERS
from flowbp_ray.prompts import read_prompts
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "prompts.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
PROMPTS = [{"caption": f"a {size} cat", "prompt": f"a {size} cat", "challenge": "basic", "importance": len(size),
            "category": kind} for size in ("red", "large", "small", "green", "old", "new", "far")
           for kind in ("Animals", "Food")]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_reads_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in PROMPTS)
    Path("my_dataset").mkdir()
    for name in ("my_dataset/train.jsonl", "my_dataset/test.jsonl", "prompts.jsonl"):
        Path(name).write_text(rows)
    Path("prompts.csv").write_text("prompt,importance\na cat,2\na dog,0.5\n")
    Path("mine.yaml").write_text("extends: shapes_refl.yaml\n" + block.replace("0.05", "0.5"))
    training, held_out = read_prompts(loading.load("mine.yaml", ["evaluation.every=0"]))
    assert len(training) + (len(held_out) if "heldout" in block else 0) == (
        7 if "where" in block else 2 if "weights" in block else 14
    )


def test_the_line_is_what_a_run_prints() -> None:
    config = loading.load("shapes_demo")
    training, held_out = read_prompts(config)
    line = describe_prompts(config, training, held_out, len(set(drawn_texts(config, training, held_out))), cut=False)
    assert f"\n{line}\n" in PAGE


def test_every_kind_of_file_is_in_the_table() -> None:
    assert all(f"`{kind}`" in PAGE or f"prompts{kind}`" in PAGE for kind in READERS)
