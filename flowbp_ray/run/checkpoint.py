"""The checkpoints of a run. Each is a folder that gets its name when it is complete.

    step_000040/
        manifest.json            the sha256 of each other file
        engine/                  the engine's state, by parameter (see `run.engine_state`)
        weights.safetensors      the published weights of version 40
        average.safetensors      their average, where one is kept
        version_39.safetensors   older versions that batches of a stale run still need
        evaluations.npz          the evaluations so far and the first pictures
        unjudged.npz             pictures of evaluations whose answers from a judge are missing, where there are any
    step_000041.partial/         one that is being written
    step_000039.damaged/         one whose files are not those of its manifest, set aside

Prompts, noise, plans, jitter and the learning rate are functions of the step and need not be stored.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from torch import Tensor

from flowbp_ray.run.manifest import (
    MANIFEST,
    checkpoint_damages,
    damages,
    file_damages,
    read_manifest,
    write_manifest,
)
from flowbp_ray.run.snapshot import (
    AVERAGE,
    EVALUATIONS,
    UNJUDGED,
    WEIGHTS,
    Snapshot,
    npz,
    read_arrays,
    read_tensors,
    write_snapshot,
)
from flowbp_ray.utils.background import started
from flowbp_ray.utils.errors import ConfigError, RunFailed
from flowbp_ray.utils.files import locked, size_of, sync, write_atomically
from flowbp_ray.utils.tensor_file import check_room

PARTIAL, REPLACED, DAMAGED = ".partial", ".replaced", ".damaged"
NAME = re.compile(r"step_\d{6,}")


class Checkpoints:
    """The checkpoints in a folder. They are written under another name and renamed at the end, so none is torn.

    A new one is read back in a thread; older ones are removed after that. Nothing else here runs beside the thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader: threading.Thread | None = None
        self.failure = ""  # what the thread found

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`, whether or not it exists."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        found = {path.parent.name for name in (WEIGHTS, MANIFEST) for path in self.folder.glob(f"step_*/{name}")}
        return sorted(int(name.removeprefix("step_")) for name in found if NAME.fullmatch(name))

    def begin(self, step: int) -> Path:
        """Make an empty folder for the engine's state. What a killed run left half-written is removed.

        Raises NoSpace where the disk has not the bytes free that the newest checkpoint takes.
        """
        self.settle()
        self.tidy()
        partial = self.path(step).with_suffix(PARTIAL)
        if steps := self.steps():
            newest = self.path(steps[-1])
            check_room(partial, size_of(newest), f"one of the size of {newest.name}")
        partial.mkdir(parents=True)
        return partial

    def abandon(self, step: int) -> None:
        """Remove what was written since `begin`, which frees its room."""
        shutil.rmtree(self.path(step).with_suffix(PARTIAL), ignore_errors=True)

    def finish(
        self, snapshot: Snapshot, keep: int, spare: int | None = None, written: Mapping[str, str] | None = None
    ) -> None:
        """Add `snapshot` to the folder that `begin` made, and name it; then, in a thread, what `settle` waits for.

        There it is read back and all but the newest `keep` are removed. spare: a step whose checkpoint stays too, as
        does each that someone is reading. written: the sha256 of the files that the engine wrote, by name. Raises
        NoSpace where the disk is full; the older checkpoints stay.
        """
        partial = self.path(snapshot.step).with_suffix(PARTIAL)
        self.commit(snapshot.step, keep, spare, {**(written or {}), **write_snapshot(snapshot, partial)})

    def write(self, snapshot: Snapshot) -> Future[dict[str, str]]:
        """Add `snapshot` to the folder that `begin` made, in a thread; the result is the sha256 of its files by name.

        Its tensors and arrays must not change meanwhile. Raises NoSpace where the result is asked for.
        """
        partial = self.path(snapshot.step).with_suffix(PARTIAL)
        return started(lambda: write_snapshot(snapshot, partial))

    def commit(self, step: int, keep: int, spare: int | None, digests: Mapping[str, str]) -> None:
        """Name the folder that `begin` made, in which all is written. digests: the sha256 of each file by name.

        keep, spare: see `finish`, which does the same.
        """
        final = self.path(step)
        partial = final.with_suffix(PARTIAL)
        # the contents before the name: a folder that has its name is complete, after a power cut too
        for folder in sorted(path for path in partial.rglob("*") if path.is_dir()):
            sync(folder)
        manifest = {name: [digest] for name, digest in digests.items()}
        write_manifest(partial, manifest)
        if final.exists():
            final.rename(final.with_suffix(REPLACED))
        partial.rename(final)
        sync(self.folder)
        shutil.rmtree(final.with_suffix(REPLACED), ignore_errors=True)
        self.reader = threading.Thread(target=self._read_back, args=(step, manifest, keep, spare), daemon=True)
        self.reader.start()

    def _read_back(self, step: int, manifest: Mapping[str, Sequence[str]], keep: int, spare: int | None) -> None:
        """Compare a new checkpoint with what was written; then remove older ones, or set it aside and keep them."""
        try:
            if wrong := damages(self.path(step), manifest):
                self.failure = f"{self._set_aside(step, wrong)}: the disk gave back other bytes than were written"
                return
            for old in self.steps()[:-keep]:
                if old != spare:
                    self._remove(old)
        except OSError as error:
            self.failure = f"the checkpoints in {self.folder} could not be read back or removed ({error})"

    def settle(self) -> None:
        """Wait until the newest checkpoint was read back. Raises RunFailed where it is not what was written."""
        if self.reader is not None:
            self.reader.join()
            self.reader = None
        if self.failure:
            failure, self.failure = self.failure, ""
            raise RunFailed(f"{failure}; check the disk, then go on with resume=auto from the one before")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Settle, unless the program is to end at once; then the older checkpoints stay."""
        if kind is None or issubclass(kind, Exception):
            self.settle()

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, unless someone reads it; then one of the next `finish` does."""
        with contextlib.suppress(BlockingIOError), locked(self.path(step), fcntl.LOCK_EX | fcntl.LOCK_NB):
            self._remove_at_once(step)

    def _remove_at_once(self, step: int) -> None:
        """Remove a checkpoint, by another name first: one that has its name has all its files."""
        doomed = self.path(step).with_suffix(PARTIAL)
        self.path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def reading(self, step: int) -> AbstractContextManager[None]:
        """Inside the context no process removes the checkpoint of `step`."""
        return locked(self.path(step), fcntl.LOCK_SH)

    def tidy(self) -> None:
        """Remove what a killed run left half-written; give a checkpoint its name back if its new one never got it."""
        for torn in self.folder.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(torn, ignore_errors=True)
        for old in self.folder.glob(f"step_*{REPLACED}"):
            if old.with_suffix("").exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(old.with_suffix(""))

    def damages(self, step: int) -> list[str]:
        """Read all files of a checkpoint and return what is wrong with it; empty where it is as it was written.

        Raises ConfigError where another version of this package wrote it.
        """
        return checkpoint_damages(self.path(step))

    def sound(self, step: int) -> Path:
        """The folder of a checkpoint, whose files are as they were written. Raises RunFailed where they are not."""
        self.settle()
        if wrong := self.damages(step):
            raise RunFailed(f"the checkpoint of step {step} is damaged: {wrong[0]}")
        return self.path(step)

    def set_damaged_aside(self) -> list[str]:
        """Rename the newest checkpoints until one is as it was written; return a line on each that was not."""
        self.settle()
        self.tidy()
        lines = []
        while steps := self.steps():
            if not (wrong := self.damages(steps[-1])):
                break
            lines.append(self._set_aside(steps[-1], wrong))
        return lines

    def _set_aside(self, step: int, wrong: Sequence[str]) -> str:
        """Give a damaged checkpoint another name; return a line that says so."""
        aside, number = self.path(step).with_suffix(DAMAGED), 2
        while aside.exists():
            aside, number = aside.with_suffix(f"{DAMAGED}-{number}"), number + 1
        self.path(step).rename(aside)
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"the checkpoint of step {step} is damaged ({wrong[0]}{more}); set aside as {aside.name}"

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints that are newer than `step`, also one that someone reads: the run has gone back."""
        self.settle()
        for newer in [s for s in self.steps() if s > step]:
            self._remove_at_once(newer)

    def weights(self, step: int | None = None, average: bool = False) -> tuple[int, dict[str, Tensor]]:
        """Return a checkpoint's step and its published weights by name. step: the newest checkpoint's by default.

        average: take the average of the weights, which is what evaluations measure, where the checkpoint has one.
        Raises ConfigError where there is no such checkpoint, or the file is not what was written.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; there are: {steps or 'none'}")
        step = steps[-1] if step is None else step
        name = AVERAGE if average and self.has_average(step) else WEIGHTS
        with self.reading(step):
            if wrong := file_damages(self.path(step), name):
                raise ConfigError(f"{self.path(step)}: {wrong[0]}; write the step of another checkpoint")
            return step, read_tensors(self.path(step) / name)

    def has_average(self, step: int) -> bool:
        """Whether the checkpoint of `step` holds an average of the weights."""
        return (self.path(step) / AVERAGE).is_file()

    def versions(self, step: int) -> dict[int, dict[str, Tensor]]:
        """The older published weights that a checkpoint holds, by step."""
        files = self.path(step).glob("version_*.safetensors")
        return {int(file.stem.removeprefix("version_")): read_tensors(file) for file in files}

    def evaluations(self, step: int) -> dict[str, np.ndarray]:
        """The evaluations up to `step`, as arrays by name: what `Evaluator.load` takes."""
        return read_arrays(self.path(step) / EVALUATIONS)

    def replace_evaluations(self, step: int, evaluations: Mapping[str, np.ndarray]) -> None:
        """Replace the evaluations of a checkpoint by these, in which no answer of a judge is missing any more.

        Whenever it is interrupted, the files are those of the manifest: in between it names both evaluations.
        """
        self.settle()
        folder, data = self.path(step), npz(evaluations)
        files, new = read_manifest(folder), hashlib.sha256(data).hexdigest()
        write_manifest(folder, {**files, EVALUATIONS: [*files[EVALUATIONS], new]})
        write_atomically(folder / EVALUATIONS, lambda path: path.write_bytes(data), fsync=True)
        files.pop(UNJUDGED, None)
        write_manifest(folder, {**files, EVALUATIONS: [new]})
        (folder / UNJUDGED).unlink(missing_ok=True)
        sync(folder)

    def unjudged(self, step: int) -> dict[str, np.ndarray]:
        """Pictures that no judge has answered about yet (see `actors.judges`); empty where there are none."""
        if not (self.path(step) / UNJUDGED).is_file():
            return {}
        return read_arrays(self.path(step) / UNJUDGED)
