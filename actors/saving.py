"""Checkpoints of a run in progress: the learners write and read their parts, the driver the rest."""

from __future__ import annotations

from collections.abc import Callable

from actors.errors import LearnersLost
from actors.fleet import Fleet
from actors.learner_group import LearnerGroup
from flowbp_ray.run.checkpoint import Checkpoints, Snapshot
from flowbp_ray.run.engine_state import moved
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed


def save(
    fleet: Fleet,
    checkpoints: Checkpoints,
    step: int,
    snapshot: Callable[[int], tuple[Snapshot, int | None]],
    keep: int,
) -> None:
    """Write the checkpoint of `step`. snapshot: called with it once the learners have written; the int is a `spare`.

    keep, spare: as in `Checkpoints.finish`. Raises RunFailed where there is no room for it; then nothing of it is left,
    and all that was there before.
    """
    try:
        written = fleet.learners.save(str(checkpoints.begin(step).resolve()))
        added, spare = snapshot(step)
        checkpoints.finish(added, keep, spare, written)
    except RunFailed as error:
        if not isinstance(error, LearnersLost):  # whose ranks may still be writing
            checkpoints.abandon(step)
        raise
    fleet.saved(step)


def load(learners: LearnerGroup, run: Run, step: int, note: Callable[[str], None]) -> None:
    """Give the learners the state of a checkpoint. note: takes a line that says so if other learners wrote it."""
    folder = run.checkpoints.path(step)
    with run.checkpoints.reading(step):
        learners.load(str(folder.resolve()))
    if changed := moved(folder, learners.config.learners.moves):
        line = f"from step {step} on sums round differently: {', '.join(changed)}"
        run.logger().info("%s", line)
        note(line)


def steps(checkpoints: Checkpoints, again: bool) -> list[int]:
    """Steps of the checkpoints. again: look first whether the newest one was damaged since the run began.

    Raises RunFailed if it was; it is then set aside. An older one needs prompts that the run may have let go of, so it
    is for the run's next start.
    """
    if again and (damaged := checkpoints.set_damaged_aside()):
        raise RunFailed(f"{damaged[0]}; resume=auto goes on from the one before")
    return checkpoints.steps()
