"""A run on prompts as people have them: columns, weights, a held-out share, and no text encoder for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowbp_ray.driver import train
from flowbp_ray.evaluate import evaluate
from flowbp_ray.evaluation.standalone import Request
from flowbp_ray.prompts import ids_of_step, load, read_prompts, weights_of
from flowbp_ray.utils.errors import ConfigError
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray


def test_weighted_prompts_and_a_held_out_share(local_ray: Any, tmp_path: Path) -> None:
    """The bits of one process; what the run evaluates is what `eval --prompts data:heldout` evaluates."""
    file = tmp_path / "prompts.csv"
    texts = list(dict.fromkeys(r.text for r in load("shapes:train")))[:24]
    rows = [f"{text},{'odd' if i % 2 else 'even'},{i % 4}" for i, text in enumerate(texts)]
    file.write_text("caption,kind,often\n" + "\n".join(rows) + "\n")
    config = small_config(
        tmp_path,
        "flowbp_sparse",
        f"data.prompts={file}",
        "data.columns={prompt: caption, skill: kind}",
        "data.weights=often",
        "data.heldout={fraction: 0.3}",
        "evaluation.prompts=data:heldout",
        "evaluation.batch=4",
        "evaluation.num_steps=4",
        "encoder.cache=null",
        "steps=5",
        "name=data",
        "checkpoint.every=2",
    )
    run, summary = train(config)
    assert summary["weights_sha256"] == local_digest(config)
    training, held_out = read_prompts(config)
    assert 0 < len(held_out) < 24 and {record.skill for record in held_out} == {"odd", "even"}
    drawn = {training[i].weight for s in range(5) for i in ids_of_step(len(training), 4, s, 42, weights_of(training))}
    assert 0 not in drawn and 0 in {record.weight for record in training}
    log = (run.folder / "log.txt").read_text()
    assert f"prompts: {len(training)} of {file}" in log and "drawn by often from 0 to 3" in log
    _, found = evaluate(Request(str(run.folder), "data:heldout"))
    saved = run.checkpoints.evaluations(5)["values|5|1.0|shapes_clip"]
    assert np.array_equal(found.values[1.0]["shapes_clip"][:, 0], saved)
    file.write_text(file.read_text().replace(",3\n", ",2\n"))  # other weights
    with pytest.raises(ConfigError, match="have changed since it began"):
        train(config.model_copy(update={"resume": "auto"}))
