"""Checkpoints are written beside the steps: the loop goes on, a crash leaves the one before, a failure ends the run."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from actors import learner_group
from actors.learner import LearnerActor
from flowbp_ray import driver
from flowbp_ray.driver import Loop
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from tests.driver.chaos import before_step
from tests.driver.faulty import instead
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray


class LateLearner(LearnerActor):
    """Begins to write a state once the file `go` is there, beside the checkpoints."""

    def save(self, folder: str, background: bool) -> None:
        engine = self.saver.engine
        save, go = type(engine).save, Path(folder).parent / "go"

        def late(where: Path, own: Any = None) -> dict[str, str]:
            while background and not go.exists():
                time.sleep(0.01)
            return save(engine, where, own)

        engine.save = late  # type: ignore[method-assign]
        super().save(folder, background)


class Crash(Exception):
    """Stands for whatever ends a driver."""


def test_the_loop_goes_on_while_a_checkpoint_is_written(local_ray: Any, tmp_path: Path) -> None:
    """Two steps later it has no name yet; the next save waits for it. The files are those of a run that waits."""
    shared = ["steps=5", "checkpoint.every=1", "checkpoint.keep=9", "staleness=1", "learners.ema.decay=0.9"]
    config, seen = small_config(tmp_path, "flowbp_sparse", "name=beside", "checkpoint.every=2", *shared[2:],
                                "steps=5"), []  # fmt: skip

    def look(loop: Loop) -> None:
        seen.append(loop.run.checkpoints.steps())
        assert list(loop.run.checkpoints.folder.glob("step_000002.partial"))
        (loop.run.checkpoints.folder / "go").touch()

    with instead(learner_group, "RemoteLearner", LateLearner), before_step(3, look) as called:
        run, summary = driver.train(config)
    assert called == [3] and seen == [[]] and run.checkpoints.steps() == [2, 4, 5]
    waiting = small_config(tmp_path, "flowbp_sparse", "name=waiting", "checkpoint.background=false", *shared)
    other, expected = driver.train(waiting)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    for step in (2, 4, 5):
        assert run.checkpoints.damages(step) == []
        for file in sorted((run.checkpoints.path(step) / "engine").iterdir()):
            assert file.read_bytes() == (other.checkpoints.path(step) / "engine" / file.name).read_bytes()
        assert (run.checkpoints.path(step) / "manifest.json").read_text() == (
            other.checkpoints.path(step) / "manifest.json"
        ).read_text()


@pytest.mark.long
def test_a_failure_in_the_thread_ends_the_run_at_the_next_step(local_ray: Any, tmp_path: Path) -> None:
    """As a full disk does; nothing is left of the checkpoint, and the one before is whole and gone on from."""

    class FullLearner(LearnerActor):
        def save(self, folder: str, background: bool) -> None:
            if folder.endswith("step_000002.partial"):
                (Path(folder) / "engine").mkdir()
                (Path(folder) / "engine" / "rank_0000.safetensors").symlink_to("/dev/full")
            super().save(folder, background)

    settings = ["steps=4", "checkpoint.every=1", "name=mine", "resume=auto"]
    config = small_config(tmp_path, "flowbp_sparse", *settings)
    with (
        instead(learner_group, "RemoteLearner", FullLearner),
        pytest.raises(RunFailed, match=r"no room for a checkpoint .* rank_0000.safetensors was written; make room"),
    ):
        driver.train(config)
    run = Run.open(tmp_path / "mine")
    assert [path.name for path in run.checkpoints.folder.iterdir()] == ["step_000001"]
    assert run.checkpoints.damages(1) == []
    _, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)


def test_a_crash_while_it_is_written_leaves_the_one_before(local_ray: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "steps=4", "checkpoint.every=2", "name=mine", "resume=auto")

    def crash(loop: Loop) -> None:
        loop.saver.pending = None  # as a process that is gone, it settles nothing
        raise Crash

    with (
        instead(learner_group, "RemoteLearner", LateLearner),
        before_step(2, crash),
        suppress(Crash),
    ):
        driver.train(config)
    run = Run.open(tmp_path / "mine")
    assert run.checkpoints.steps() == [] and list(run.checkpoints.folder.glob("step_000002.partial"))
    run, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)
    assert run.checkpoints.steps() == [2, 4]
