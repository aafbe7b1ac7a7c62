"""A run in TensorBoard: event files in the run's folder, train/ for steps and evaluation/ for what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.observability.destinations import Shown
from flowbp_ray.run.pictures import grid

PARTS = ("train", "evaluation")


class TensorboardRun:
    """Writes event files by torch.utils.tensorboard, in a thread of its own.

    Two parts, because they go on from different steps: after the checkpoint of step s, training step s comes again, and
    the evaluation of step s does not. TensorBoard leaves out what came after `purge_step` before.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        """folder: holds the parts. Nothing is written before the first number."""
        self.folder = folder
        self.writers: dict[str, Any] = {}
        self.purge: dict[str, int | None] = dict.fromkeys(PARTS)

    def log(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        writer = self._writer("train" if kind == "train" else "evaluation")
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def show(self, step: int, shown: Shown) -> None:
        """A sheet with the prompts below the pictures, and the prompts in full as text."""
        writer = self._writer("evaluation")
        sheet = np.asarray(grid(shown.pictures, shown.prompts, columns=4))
        writer.add_image(shown.name, sheet, step, dataformats="HWC")
        listed = "\n".join(f"{i}. {' '.join(prompt.split())}" for i, prompt in enumerate(shown.prompts, 1))
        writer.add_text(f"{shown.name}/prompts", listed, step)

    def rewind(self, step: int) -> None:
        self.close()
        self.purge = {"train": max(step, 0), "evaluation": step + 1}

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}

    def _writer(self, part: str) -> Any:
        if part not in self.writers:
            from torch.utils.tensorboard import SummaryWriter

            self.writers[part] = SummaryWriter(str(self.folder / part), purge_step=self.purge[part], flush_secs=30)
        return self.writers[part]
