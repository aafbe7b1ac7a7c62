"""A checkpoint: a folder that is complete once it has its name.

    step_000040/
        engine…                  what the engine wrote: masters, moments, average, by rank
        weights.safetensors      the published weights of version 40
        average.safetensors      their average, where one is kept
        version_39.safetensors   older versions that batches of a stale run still need
        evaluations.npz          the evaluations so far and the first pictures
    unjudged.npz             pictures of evaluations that a judge has not answered about, where there are any

Prompts, noise, plans, jitter and the learning rate are functions of the step, so the step is all the rest there is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowbp_ray.utils.errors import ConfigError

WEIGHTS = "weights.safetensors"
AVERAGE = "average.safetensors"
UNJUDGED = "unjudged.npz"


class Checkpoints:
    """The checkpoints of a run. Written under another name and renamed at the end, so a torn one is never found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        found = self.folder.glob(f"step_*/{WEIGHTS}")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in found if path.parent.suffix == "")

    def begin(self, step: int) -> Path:
        """An empty folder to write into; what a killed run left half-written is removed."""
        partial = self.path(step).with_suffix(".partial")
        for torn in self.folder.glob("step_*.partial"):
            shutil.rmtree(torn, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(
        self,
        step: int,
        keep: int,
        weights: Mapping[str, Tensor],
        versions: Mapping[int, Mapping[str, Tensor]],
        evaluations: Mapping[str, np.ndarray],
        average: Mapping[str, Tensor] | None = None,
        spare: int | None = None,
        unjudged: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add the published weights and the evaluations, give the folder its name, remove all but the newest `keep`.

        spare: a step whose checkpoint stays too.
        """
        partial, final = self.path(step).with_suffix(".partial"), self.path(step)
        for version, tensors in versions.items():
            _save(tensors, partial / f"version_{version}.safetensors")
        np.savez(partial / "evaluations.npz", **dict(evaluations))  # type: ignore[arg-type]
        if unjudged:
            np.savez_compressed(partial / UNJUDGED, **dict(unjudged))  # type: ignore[arg-type]
        if average is not None:
            _save(average, partial / AVERAGE)
        _save(weights, partial / WEIGHTS)
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(self.folder)
        for old in self.steps()[:-keep]:
            if old != spare:
                shutil.rmtree(self.path(old))

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints that are newer than `step`."""
        for newer in [s for s in self.steps() if s > step]:
            shutil.rmtree(self.path(newer))

    def weights(self, step: int | None = None, average: bool = False) -> tuple[int, dict[str, Tensor]]:
        """Published weights of a checkpoint (the newest one by default), and its step.

        average: the average of the weights where the checkpoint has one: what evaluations measured.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; there are: {steps or 'none'}")
        step = steps[-1] if step is None else step
        has = average and self.has_average(step)
        return step, load_file(self.path(step) / (AVERAGE if has else WEIGHTS))

    def has_average(self, step: int) -> bool:
        """Whether the checkpoint of `step` holds an average of the weights."""
        return (self.path(step) / AVERAGE).is_file()

    def versions(self, step: int) -> dict[int, dict[str, Tensor]]:
        """The older versions that a checkpoint holds."""
        files = self.path(step).glob("version_*.safetensors")
        return {int(file.stem.removeprefix("version_")): load_file(file) for file in files}

    def evaluations(self, step: int) -> dict[str, np.ndarray]:
        with np.load(self.path(step) / "evaluations.npz") as stored:
            return dict(stored)

    def judged(self, step: int, evaluations: Mapping[str, np.ndarray]) -> None:
        """Exchange the evaluations of a checkpoint for these, in which nothing is left to be judged."""
        partial = self.path(step) / "evaluations.partial.npz"
        np.savez(partial, **dict(evaluations))  # type: ignore[arg-type]
        _sync(partial)
        partial.rename(self.path(step) / "evaluations.npz")
        (self.path(step) / UNJUDGED).unlink(missing_ok=True)
        _sync(self.path(step))

    def unjudged(self, step: int) -> dict[str, np.ndarray]:
        """Pictures that were not judged yet (see `actors.judges`); empty where there are none."""
        if not (self.path(step) / UNJUDGED).is_file():
            return {}
        with np.load(self.path(step) / UNJUDGED) as stored:
            return dict(stored)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _sync(path: Path) -> None:
    """Onto the disk before the name is: a folder that has its name must have its contents, after a power cut too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
