"""A run against itself and against changed copies: the first number that differs is named, times do not count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbp_ray.artifacts.reproduction import again, compare_runs
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError
from tests.small import small_config

Line = dict[str, Any]


def run_of(folder: Path, change: Callable[[Line], None] = lambda line: None, weight: float = 1.0) -> Run:
    """Two steps, evaluated before and after, with a checkpoint of the second; made by hand."""
    run = Run.create(small_config(folder))
    lines: list[Line] = [{"step": 0, "kind": "evaluation", "guidance": 1.0, "shapes_clip": 0.5}]
    lines += [{"step": i, "kind": "train", "loss": 0.25 * i, "reward/a": float("nan"), "step_s": i} for i in range(2)]
    lines += [{"step": 2, "kind": "evaluation", "guidance": 1.0, "shapes_clip": 0.75}]
    lines += [{"step": 2, "kind": "judge", "guidance": 1.0, "judge": name, f"judge/{name}": 3.0} for name in "ab"]
    for line in lines:
        change(line)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with run.checkpoints as checkpoints:
        checkpoints.begin(2)
        checkpoints.finish(Snapshot(2, {"w": torch.full((3,), weight)}, {}, {}), keep=1)
    return run


def at(step: int, name: str, value: Any) -> Callable[[Line], None]:
    return lambda line: line.update({name: value} if line["step"] == step and name in line else {})


def test_the_same_numbers_at_other_times_are_bit_identical(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a")
    found = compare_runs(first, run_of(tmp_path / "b", at(1, "step_s", 99.0)))
    assert found.identical and found.numbers == 2 + 2 * 2 + 2 + 2 * 3  # guidance counts, times do not
    assert found.lines() == [f"bit-identical: 14 numbers and the weights (sha256 {found.weights[0][:16]}…)"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (at(1, "loss", 0.25 + 2**-53), "training step 1: loss was 0.25, is 0.2500000000000001"),
        (at(0, "shapes_clip", 0.25), "evaluation after step 0: shapes_clip was 0.5, is 0.25"),
        (at(0, "reward/a", 1.0), "training step 0: reward/a was NaN, is 1.0"),
        (at(2, "judge/a", 9.0), "judge after step 2: judge/a was 3.0, is 9.0"),
    ],
)
def test_the_first_number_that_differs_is_named(tmp_path: Path, change: Callable[[Line], None], line: str) -> None:
    found = compare_runs(run_of(tmp_path / "a"), run_of(tmp_path / "b", change))
    assert not found.identical and found.lines() == [f"not bit-identical: {line}"]


def test_weights_that_differ_are_said_even_where_all_numbers_are_equal(tmp_path: Path) -> None:
    found = compare_runs(run_of(tmp_path / "a"), run_of(tmp_path / "b", weight=1.0000001))
    assert not found.identical and found.lines()[0] == "not bit-identical: all numbers are equal"
    assert found.lines()[1].startswith("weights: sha256 ")
    with pytest.raises(ValueError, match="no checkpoint of the same step"):
        compare_runs(run_of(tmp_path / "c"), Run.create(small_config(tmp_path / "d")))


def test_what_cannot_be_run_again_is_said_before_it_is(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a")
    with pytest.raises(ValueError, match="has not ended"):
        again(first)
    first.write_summary({})
    stored = first.folder / "config.yaml"
    stored.write_text(stored.read_text().replace("base_cache: null", "base_cache: /kept"))
    assert Run.open(first.folder).config.evaluation.base_cache == "/kept"
    config = again(first, ["samplers.count=2"])
    assert config.evaluation.base_cache is None  # it draws its own
    assert (config.name, config.resume, config.samplers.count) == (f"{first.folder.name}_again", "never", 2)
    with pytest.raises(ValueError, match="another run: steps was 2, is 3"):
        again(first, ["steps=3"])
    first.bind_prompts(["other prompts"])
    with pytest.raises(ConfigError, match="have changed since it began"):
        again(first)
