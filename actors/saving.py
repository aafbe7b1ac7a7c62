"""Checkpoints of a run in progress: the learners write and read their parts, the driver the rest."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from actors.errors import LearnersLost
from actors.fleet import Fleet
from actors.learner_group import LearnerGroup
from flowbp_ray.config.sections import CheckpointConfig
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.engine_state import moved
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written. spare: see `Checkpoints.finish`. ours: the digests of the driver's files."""

    step: int
    spare: int | None
    ours: Future[dict[str, str]]


class Saver:
    """Saves a run, with `checkpoint.background` beside the steps that follow. Use it as a context manager.

    The ranks copy what they hold, which is all that the loop waits for; threads of theirs and of the driver's write it.
    `poll`, between two steps, gives the checkpoint its name once all have written; until then the one before is the
    newest. One checkpoint is written at a time.
    """

    def __init__(self, fleet: Fleet, run: Run, config: CheckpointConfig) -> None:
        self.fleet, self.run, self.config = fleet, run, config
        self.pending: Pending | None = None

    def save(self, step: int, snapshot: Callable[[int], tuple[Snapshot, int | None]], wait: bool) -> None:
        """Begin the checkpoint of `step`; `wait` until it is there. snapshot: what the driver adds, and a `spare`.

        It is called with the step once the learners have copied their state; its tensors must not change. Raises
        RunFailed where there is no room; then nothing of it is left, and all that was there before.
        """
        self.settle()
        try:
            folder = self.run.checkpoints.begin(step)
            self.fleet.learners.save(str(folder.resolve()), self.config.background and not wait)
            added, spare = snapshot(step)
        except (RunFailed, OSError) as error:
            self._give_up(step, error)
            raise
        self.pending = Pending(step, spare, self.run.checkpoints.write(added))
        if wait or not self.config.background:
            self.settle()

    def poll(self) -> None:
        """Finish the checkpoint that is being written if all of it is. Raises RunFailed where it could not be."""
        self._finish(wait=False)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Raises RunFailed where it could not be."""
        self._finish(wait=True)

    def abandon(self) -> None:
        """Forget the checkpoint that is being written: ranks of it were lost. What is on the disk of it goes."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.ours.exception()  # which waits for the thread
            self.run.checkpoints.abandon(pending.step)

    def _finish(self, wait: bool) -> None:
        pending = self.pending
        if pending is None or not (wait or pending.ours.done()):
            return
        try:
            written = self.fleet.learners.saved(wait)
            if written is None:
                return
            self.run.check_lock()
            digests = written | pending.ours.result()
            self.run.sync_log()  # a checkpoint that is there after a power cut has its steps in the log
            self.run.checkpoints.commit(pending.step, self.config.keep, pending.spare, digests)
        except (RunFailed, OSError) as error:
            self.pending = None
            pending.ours.exception()
            self._give_up(pending.step, error)
            raise
        self.pending = None
        self.fleet.saved(pending.step)

    def _give_up(self, step: int, error: Exception) -> None:
        """Remove what was written of the checkpoint, once nobody writes any more."""
        if not isinstance(error, LearnersLost):  # whose ranks are ended, and may be writing until then
            self.fleet.learners.await_saves()
            self.run.checkpoints.abandon(step)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Settle, unless the program is to end at once; an error that is under way goes before one of saving."""
        if kind is None:
            self.settle()
        elif issubclass(kind, Exception):
            with suppress(RunFailed, OSError):
                self.settle()


def load(learners: LearnerGroup, run: Run, step: int, note: Callable[[str], None]) -> None:
    """Give the learners the state of a checkpoint. note: takes a line that says so if other learners wrote it."""
    folder = run.checkpoints.path(step)
    with run.checkpoints.reading(step):
        learners.load(str(folder.resolve()))
    if changed := moved(folder, learners.config.learners.moves):
        line = f"from step {step} on sums round differently: {', '.join(changed)}"
        run.logger().info("%s", line)
        note(line)


def steps(run: Run, again: bool) -> list[int]:
    """Steps of the checkpoints. again: look first whether the newest one was damaged since the run began.

    Raises RunFailed if it was; it is then set aside. An older one needs prompts that the run may have let go of, so it
    is for the run's next start.
    """
    if again and (damaged := run.checkpoints.set_damaged_aside()):
        raise RunFailed(f"{damaged[0]}; resume=auto goes on from the one before")
    return run.checkpoints.steps()
