"""The card's front matter, read back as the Hub reads it: what it states of the model, and whose scores it lists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from flowbp_ray.artifacts.card_pictures import Shown, gallery
from flowbp_ray.artifacts.export import export
from flowbp_ray.run.folder import Run
from tests.artifacts.exporting import trained_run
from tests.small import small_config

SETTINGS = [
    "name=scored",
    "steps=3",
    "checkpoint={every: 1, keep: 3}",
    "learners.lora={rank: 4, alpha: 6}",
    "learners.ema={decay: 0.5}",
    "rewards.monitors=[shapes_clip_heldout]",
    "evaluation={prompts: 'shapes:heldout', limit: 6, batch: 6, every: 2, guidance: [1.0, 2.0], num_steps: 2}",
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps of adapters with an average, which is evaluated before the first, after the second and the third."""
    return trained_run(small_config(tmp_path_factory.mktemp("runs"), "flowbp_sparse", *SETTINGS))


def front(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def measured(run: Run, step: int) -> dict[tuple[str, float], float]:
    """Means of an evaluation by metric and guidance, taken from the pictures' values in the checkpoint."""
    found = {}
    for key, array in run.checkpoints.evaluations(step).items():
        kind, _, rest = key.partition("|")
        if kind != "picture" and rest.startswith(f"{step}|"):
            _, guidance, name = rest.split("|", 2)
            found[name, float(guidance)] = float(array.mean())
    return found


def test_the_hub_reads_the_scores_of_the_exported_weights(scored: Run, tmp_path: Path) -> None:
    """By its own reader, for each guidance, against the values of the pictures and summary.json."""
    export(scored, tmp_path / "out", average=True)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.model_name == "scored" and data.library_name == "diffusers"
    found = {}
    for result in data.eval_results:
        assert (result.task_type, result.dataset_type) == ("text-to-image", "shapes:heldout")
        guidance = result.metric_args["guidance"]
        trained = " (trained on)" if result.metric_type == "shapes_clip" else ""
        assert result.metric_name == f"{result.metric_type}{trained}, guidance {guidance:g}"
        found[result.metric_type, guidance] = result.metric_value
    whole = {key: value for key, value in found.items() if "/" not in key[0]}
    assert whole == pytest.approx(measured(scored, 3)) and len({guidance for _, guidance in found}) == 2
    summary = json.loads((scored.folder / "summary.json").read_text())["guidance"]
    for (name, guidance), value in found.items():
        after = summary[f"{guidance:g}"]["after"][name]
        assert value == (after["mean"] if isinstance(after, dict) else after)
    assert len(found) == sum(len(part["after"]) for part in summary.values())


def test_the_keys_of_the_front_matter(scored: Run, tmp_path: Path) -> None:
    export(scored, tmp_path / "out", average=True)
    known = front(tmp_path / "out")
    del known["model-index"]
    shown = known.pop("widget")
    assert len(shown) == 6 and all((tmp_path / "out" / one["output"]["url"]).is_file() for one in shown)
    assert known == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "flowbp_ray-shapes",
        "base_model_relation": "adapter",
        "tags": ["flowbp_ray", "text-to-image", "flow-matching", "reward-backpropagation", "lora"],
    }


@pytest.mark.parametrize(
    ("step", "average"),
    [(1, True), (3, False)],
    ids=["a step that was not evaluated", "weights of which the average was evaluated"],
)
def test_scores_of_other_weights_are_not_listed(scored: Run, tmp_path: Path, step: int, average: bool) -> None:
    export(scored, tmp_path / "out", step, average=average)
    assert not {"model-index", "model_name", "eval_results"} & front(tmp_path / "out").keys()


def test_an_earlier_checkpoint_has_its_own_scores(scored: Run, tmp_path: Path) -> None:
    export(scored, tmp_path / "out", 2, average=True)
    [index] = front(tmp_path / "out")["model-index"]
    [result] = index["results"]
    found = {(m["type"], m["args"]["guidance"]): m["value"] for m in result["metrics"] if "/" not in m["type"]}
    assert found == pytest.approx(measured(scored, 2)) and found != pytest.approx(measured(scored, 3))


def test_a_prompt_stays_text_in_the_table_of_pictures() -> None:
    """Whatever it contains: the table has its rows and columns, and no other picture or link."""
    prompts = ["a | b", "two\nlines", "![x](http://y)", "<img src=x>", "*bold* `code`"]
    table = gallery([Shown(f"images/{i}.png", prompt, 3.0) for i, prompt in enumerate(prompts)]).split("\n\n")[1]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    assert [len(row) for row in rows] == [3] * 5 and rows[1] == [" --- "] * 3
    assert re.findall(r"(?<!\\)!\[.*?\]\((.*?)\)", table) == [f"images/{i}.png" for i in range(5)]
    assert r"a \| b" in table and "two lines" in table and r"\<img src=x\>" in table and r"\*bold\* \`code\`" in table
