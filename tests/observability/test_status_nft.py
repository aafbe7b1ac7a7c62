"""`flowbp-ray status` of a run with terms without gradient."""

from __future__ import annotations

import json
from pathlib import Path

from flowbp_ray.observability.reader import Reader
from flowbp_ray.observability.status_view import rows
from flowbp_ray.run.folder import Run
from tests.small import small_config


def test_the_table_has_their_loss_and_how_many_prompts_gave_none(tmp_path: Path) -> None:
    terms = ["method=null", "rewards.terms=[{name: shapes_clip, gradient: none}]", "data.images_per_prompt=2"]
    run = Run.create(small_config(tmp_path, "flowbp_sparse", *terms))
    line = {"kind": "train", "step": 0, "step_s": 1.0, "loss": 0.0, "nft_loss": 2.5, "old_distance": 0.125}
    line |= {"nft_alike": 0.25, "nft_unscored": 0.5, "kept": 1.0, "reward/shapes_clip": 0.5}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = dict(rows(Reader(run.folder).snapshot()))
    assert found["loss"] == "loss 0, nft_loss 2.5, old_distance 0.125, kept 1"
    assert found["no signal"] == "nft_alike 0.25, nft_unscored 0.5" and found["rewards"] == "shapes_clip 0.5"
