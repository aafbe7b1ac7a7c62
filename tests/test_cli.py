"""The door: what it prints, what a run leaves on disk, and how it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from flowbp_ray.cli import app
from flowbp_ray.config import loading
from flowbp_ray.surrogate import METHODS
from flowbp_ray.utils.console import guarded
from tests.small import small_overrides


def call(*args: str) -> int:
    """Exit code of `flowbp-ray args`."""
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: app(list(args)))
    return int(stop.value.code or 0)


def test_methods_lists_the_seven(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods") == 0
    printed = capsys.readouterr().out
    assert len(METHODS) == 7 and all(name in printed for name in METHODS)


def test_plan_describes_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "shapes_flowbp_bridge", "--describe") == 0
    printed = capsys.readouterr().out
    assert "32 samples, 1 different plan(s)" in printed and "<- junction" in printed
    assert call("plan", "shapes_flowbp_bridge", "method.draws=per_sample") == 0
    assert "32 samples, 1 different" not in capsys.readouterr().out


BAD = {
    "unknown config": ["train", "shapes_refll"],
    "unknown method": ["train", "shapes_refl", "method.name=ref"],
    "k above n": ["train", "shapes_flowbp_sparse", "method.k=17"],
    "batch": ["train", "shapes_refl", "data.rollout_batch=5"],
    "missing prompts": ["train", "shapes_refl", "data.prompts=/nowhere/prompts.txt"],
    "unknown key": ["train", "shapes_refl", "learners.optimiser.lr=1"],
    "unknown reward": ["train", "shapes_refl", "rewards.monitors=[shapes_clipp]"],
    "cache": ["train", "shapes_refl", "encoder.cache=/dev/null/cache"],
    "nothing to fill": ["encode", "shapes_refl", "encoder.cache=null"],
    "unknown backbone": ["train", "shapes_refl", "backbone.name=shape"],
    "no model": ["train", "shapes_refl", "backbone.path=/nowhere"],
    "no run": ["sample", "/nowhere", "-p", "a red circle"],
    "no run to look at": ["status", "/nowhere"],
    "no run in there": ["status", "docs"],
    "no run to report": ["report", "/nowhere"],
    "a folder without a run": ["report", "docs"],
    "size": ["train", "shapes_refl", "backbone.height=128"],
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_two_lines_at_most_and_starts_nothing(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = [f"output={tmp_path}"] if BAD[case][0] == "train" else []
    was_up = ray.is_initialized()
    assert call(*BAD[case], *extra) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("flowbp-ray: ") and len(message.splitlines()) <= 2
    assert ray.is_initialized() == was_up
    assert not list(tmp_path.iterdir())


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("trane") == 2
    assert "No such command 'trane'" in capsys.readouterr().err


@pytest.mark.ray
def test_train_then_sample(local_ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file that a run promises is there and says something; a checkpoint draws a prompt."""
    overrides = small_overrides(tmp_path)
    overrides += ["evaluation.prompts=shapes:heldout", "evaluation.limit=6", "evaluation.batch=6", "evaluation.every=1"]
    reads = importlib.util.find_spec("tensorboard") is not None
    overrides += ["name=whole", "checkpoint.every=1", f"tracking={{wandb: true, tensorboard: {str(reads).lower()}}}"]
    assert call("train", "shapes_flowbp_sparse", *overrides) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "whole"
    assert loading.load(folder / "config.yaml").name == "whole"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("evaluation", 0),
        ("train", 0),
        ("evaluation", 1),
        ("train", 1),
        ("evaluation", 2),
    ]
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step_000001", "step_000002"}
    pictures = sorted(p.name for p in (folder / "images").iterdir())
    assert pictures == ["before_above_after_guidance_1.png", *(f"step_00000{i}_guidance_1.png" for i in range(3))]
    for path in [*(folder / "images").iterdir(), folder / "curves.png"]:
        assert np.asarray(Image.open(path).convert("RGB")).std() > 1
        assert path.name in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["guidance"]["1"]["before"]["verifier"]["count"] == 6
    assert (folder / "log.txt").is_file()
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(list((folder / "wandb").glob("offline-run-*/files/media/images/held_out/*.png"))) == 3 * 6
    if reads:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = {part.name: EventAccumulator(str(part)).Reload() for part in (folder / "tensorboard").iterdir()}
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        assert [event.value for event in read["train"].Scalars("loss/loss")] == pytest.approx(losses)
        assert [event.step for event in read["evaluation"].Images("held_out/guidance_1")] == [0, 1, 2]
    output = tmp_path / "drawn.png"
    assert call("sample", str(folder), "-p", "a red circle", "-p", "two blue squares", "-o", str(output)) == 0
    assert Image.open(output).size[0] > 256
    capsys.readouterr()
    assert call("status", str(folder)) == 0
    said = capsys.readouterr().out
    for expected in (
        "finished",
        "2 of 2,",
        "after step 2, guidance 1: shapes_clip ",
        "step 2, ",
        "samplers 1, rewards 1, learners 1",
    ):
        assert expected in said
    assert call("report", str(folder)) == 0 and str(folder / "report.html") in capsys.readouterr().out
    assert (folder / "report.html").read_text().count('class="pair"') == 6
    assert "left" not in said and json.loads((folder / "status.json").read_text())["seconds"]["evaluating"] > 0


@pytest.mark.ray
def test_a_second_run_of_the_same_name_gets_its_own_folder(tmp_path: Path) -> None:
    from flowbp_ray.run.folder import Run
    from tests.small import small_config

    config = small_config(tmp_path, "flowbp_sparse", "name=twice")
    assert [Run.create(config).folder.name for _ in range(2)] == ["twice", "twice-2"]
