"""What the page of a run and the card of an export state of how prompts were read, chosen, drawn and held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbp_ray import prompts
from flowbp_ray.artifacts.card import model_card
from flowbp_ray.artifacts.html_report import write_report
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from tests.artifacts.reported import Page, config_of, made_run

NAMES = ("columns", "split", "only where", "drawn", "held out of training", "evaluation columns", "evaluation split",
         "evaluation only where", "evaluation limit")  # fmt: skip


def stated(config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """The rows of the card's table of data, and those of the page's listing, code as plain text in both."""
    run = made_run(config)
    card = model_card(run, build_backbone(config.backbone), "full", 4, False, "ab" * 32)
    lines = card.partition("\n## Data\n")[2].partition("\n## ")[0].splitlines()
    table = [line.strip("| ").replace("`", "").split(" | ", 1) for line in lines if line.startswith("| ")]
    page = Page(write_report(run.folder).path.read_text())
    rows = {row[0].strip(): row[1].strip() for table in page.tables for row in table if len(row) == 2}
    return dict(row for row in table if len(row) == 2), rows


def data_files(folder: Path) -> Path:
    """Two splits of 40 prompts under a name of their own, with a kind and a weight."""
    (folder / "set").mkdir()
    for split in ("train", "test"):
        rows = [f"a {split} cat {i},{('animals', 'food', 'a|b `c`')[i % 3]},{1 + i % 2}" for i in range(40)]
        (folder / "set" / f"{split}.csv").write_text("\n".join(["caption,kind,share", *rows, ""]))
    return folder / "set"


@pytest.mark.parametrize("where", ["beside", "data:heldout"])
def test_all_that_is_set_is_stated_in_both(tmp_path: Path, where: str) -> None:
    folder = data_files(tmp_path)
    over = [f"data.prompts={folder}", "data.columns={prompt: caption, skill: kind}", "data.split=train",
            "data.where={kind: [animals, 'a|b `c`'], share: 1}", "data.weights=share",
            "data.heldout={fraction: 0.25, seed: 3}", "evaluation.limit=2"]  # fmt: skip
    expected = {
        "columns": "prompt from caption, skill from kind",
        "split": "train",
        "only where": "kind is animals or a|b 'c' and share is 1",
        "drawn": "in proportion to share",
        "held out of training": "25 % of the prompts, seed 3",
        "evaluation limit": "the first 2",
    }
    if where == "data:heldout":
        over += ["evaluation.prompts=data:heldout", "evaluation.where={skill: animals}"]
        expected["evaluation only where"] = "of those held out: skill is animals"
    else:
        over += [f"evaluation.prompts={folder}", "evaluation.columns={prompt: caption}", "evaluation.split=test"]
        expected |= {"evaluation columns": "prompt from caption", "evaluation split": "test"}
    config = config_of(tmp_path, *over)
    card, page = stated(config)
    assert {name: card[name].replace("\\|", "|") for name in NAMES if name in card} == expected
    assert {name: page[f"prompts, {name}"] for name in NAMES if f"prompts, {name}" in page} == expected
    training, held_out = prompts.read_prompts(config)
    assert card["number of prompts"] == str(len(training)) and card["number evaluated on"] == str(len(held_out))
    assert page["prompts"] == f"{folder}, {len(training)}"


def test_what_is_not_set_is_not_stated(tmp_path: Path) -> None:
    card, page = stated(config_of(tmp_path))
    assert not set(NAMES) & set(card) and not [name for name in page if name.startswith("prompts, ")]
    assert {"prompts", "number of prompts"} <= set(card) and "prompts" in page
