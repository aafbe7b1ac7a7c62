"""The checkpoints of a run. Each is a folder that gets its name when it is complete.

    step_000040/
        engine…                  what the engine wrote, by rank: master weights, moments, average
        weights.safetensors      the published weights of version 40
        average.safetensors      their average, where one is kept
        version_39.safetensors   older versions that batches of a stale run still need
        evaluations.npz          the evaluations so far and the first pictures
        unjudged.npz             pictures of evaluations whose answers from a judge are missing, where there are any

Prompts, noise, plans, jitter and the learning rate are functions of the step and need not be stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.files import sync, write_atomically

WEIGHTS = "weights.safetensors"
AVERAGE = "average.safetensors"
EVALUATIONS = "evaluations.npz"
UNJUDGED = "unjudged.npz"


@dataclass(frozen=True)
class Snapshot:
    """What the driver adds to a checkpoint, after the learners wrote the engine's state.

    weights, average: the published weights of `step` and their average, by name. versions: older weights that batches
    of a stale run still need, by step. evaluations, unjudged: arrays by name, as `Evaluator.state` and the judges give
    them.
    """

    step: int
    weights: Mapping[str, Tensor]
    versions: Mapping[int, Mapping[str, Tensor]]
    evaluations: Mapping[str, np.ndarray]
    average: Mapping[str, Tensor] | None = None
    unjudged: Mapping[str, np.ndarray] | None = None


class Checkpoints:
    """The checkpoints in a folder. They are written under another name and renamed at the end, so none is torn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`, whether or not it exists."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        found = self.folder.glob(f"step_*/{WEIGHTS}")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in found if path.parent.suffix == "")

    def begin(self, step: int) -> Path:
        """Make an empty folder for the engine's state. What a killed run left half-written is removed."""
        partial = self.path(step).with_suffix(".partial")
        for torn in self.folder.glob("step_*.partial"):
            shutil.rmtree(torn, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, snapshot: Snapshot, keep: int, spare: int | None = None) -> None:
        """Add `snapshot` to the folder that `begin` made, name it, and remove all but the newest `keep` checkpoints.

        spare: a step whose checkpoint stays too.
        """
        final = self.path(snapshot.step)
        partial = final.with_suffix(".partial")
        for version, tensors in snapshot.versions.items():
            _save(tensors, partial / f"version_{version}.safetensors")
        np.savez(partial / EVALUATIONS, **dict(snapshot.evaluations))  # type: ignore[arg-type]
        if snapshot.unjudged:
            np.savez_compressed(partial / UNJUDGED, **dict(snapshot.unjudged))  # type: ignore[arg-type]
        if snapshot.average is not None:
            _save(snapshot.average, partial / AVERAGE)
        _save(snapshot.weights, partial / WEIGHTS)
        # the contents before the name: a folder that has its name is complete, after a power cut too
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self.folder)
        for old in self.steps()[:-keep]:
            if old != spare:
                shutil.rmtree(self.path(old))

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints that are newer than `step`."""
        for newer in [s for s in self.steps() if s > step]:
            shutil.rmtree(self.path(newer))

    def weights(self, step: int | None = None, average: bool = False) -> tuple[int, dict[str, Tensor]]:
        """Return a checkpoint's step and its published weights by name. step: the newest checkpoint's by default.

        average: take the average of the weights, which is what evaluations measure, where the checkpoint has one.
        Raises ConfigError where there is no such checkpoint.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; there are: {steps or 'none'}")
        step = steps[-1] if step is None else step
        name = AVERAGE if average and self.has_average(step) else WEIGHTS
        return step, load_file(self.path(step) / name)

    def has_average(self, step: int) -> bool:
        """Whether the checkpoint of `step` holds an average of the weights."""
        return (self.path(step) / AVERAGE).is_file()

    def versions(self, step: int) -> dict[int, dict[str, Tensor]]:
        """The older published weights that a checkpoint holds, by step."""
        files = self.path(step).glob("version_*.safetensors")
        return {int(file.stem.removeprefix("version_")): load_file(file) for file in files}

    def evaluations(self, step: int) -> dict[str, np.ndarray]:
        """The evaluations up to `step`, as arrays by name: what `Evaluator.load` takes."""
        with np.load(self.path(step) / EVALUATIONS) as stored:
            return dict(stored)

    def replace_evaluations(self, step: int, evaluations: Mapping[str, np.ndarray]) -> None:
        """Replace the evaluations of a checkpoint by these, in which no answer of a judge is missing any more."""

        def save(path: Path) -> None:
            with path.open("wb") as file:  # given a path, numpy would put .npz behind the temporary name
                np.savez(file, **dict(evaluations))  # type: ignore[arg-type]

        write_atomically(self.path(step) / EVALUATIONS, save, fsync=True)
        (self.path(step) / UNJUDGED).unlink(missing_ok=True)
        sync(self.path(step))

    def unjudged(self, step: int) -> dict[str, np.ndarray]:
        """Pictures that no judge has answered about yet (see `actors.judges`); empty where there are none."""
        if not (self.path(step) / UNJUDGED).is_file():
            return {}
        with np.load(self.path(step) / UNJUDGED) as stored:
            return dict(stored)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
