"""Whether the disk has room for a run's checkpoints is asked before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flowbp_ray.artifacts.continuing import check_disk
from flowbp_ray.local import LocalLoop
from flowbp_ray.planning.learner_memory import checkpoint_bytes
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.files import size_of
from flowbp_ray.weights import trainable
from tests.small import small_config


@pytest.mark.parametrize("more", [["learners.ema.decay=0.9"], ["learners.lora={rank: 16}", "backbone.dtype=bfloat16"]])
def test_what_a_checkpoint_takes(tmp_path: Path, more: list[str]) -> None:
    """Against the files of a real one, names and headers within some percent; and what is said without the room."""
    config = small_config(tmp_path, "flowbp_sparse", *more)
    run, loop = Run.create(config), LocalLoop(config)
    loop.step(0)
    engine = loop.learner.engine
    written = engine.save(run.checkpoints.begin(1))
    average = engine.weights(ema=True) if config.learners.ema else None  # type: ignore[attr-defined]
    snapshot = Snapshot(1, engine.weights(), {}, {}, average)  # type: ignore[attr-defined]
    run.checkpoints.finish(snapshot, 1, written=written)
    run.checkpoints.settle()
    parameters = sum(p.numel() for p in trainable.trained(engine.bare).values())
    assert checkpoint_bytes(config, parameters) == pytest.approx(size_of(run.checkpoints.path(1)), rel=0.1)
    check_disk(run, config, parameters)


def test_a_disk_that_is_too_small_is_said_before_anything_starts(tmp_path: Path) -> None:
    """For one checkpoint; for two where the second comes before the first goes."""
    free = shutil.disk_usage(tmp_path).free
    once, often = (small_config(tmp_path, "flowbp_sparse", "steps=9", f"checkpoint.every={n}") for n in (0, 3))
    run = Run.create(once)
    fits = int(0.7 * free / checkpoint_bytes(once, 1))
    check_disk(run, once, fits)
    with pytest.raises(ConfigError, match=r"no room for two checkpoints of .* in .*: .* are free; make room"):
        check_disk(run, often, fits)
    with pytest.raises(ConfigError, match=r"no room for a checkpoint of .* in .*: .* are free; make room"):
        check_disk(run, once, 2 * fits)
