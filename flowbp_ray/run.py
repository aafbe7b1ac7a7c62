"""A run's folder: config.yaml, metrics.jsonl, log.txt, checkpoints/, images/, curves.png, summary.json."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from flowbp_ray.config import RunConfig
from flowbp_ray.loading import ConfigError, dump, load


class Run:
    """Paths and the few formats of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.checkpoints = folder / "checkpoints"

    @classmethod
    def create(cls, config: RunConfig) -> Run:
        """Make a new folder; where the name is taken, a number is added, so that nothing is overwritten."""
        folder, number = config.run_dir, 2
        while folder.exists():
            folder, number = config.run_dir.with_name(f"{config.name}-{number}"), number + 1
        run = cls(folder)
        run.images.mkdir(parents=True)
        run.checkpoints.mkdir()
        (folder / "config.yaml").write_text(dump(config))
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """An existing run. Raises ConfigError where there is none."""
        if not (Path(folder) / "config.yaml").is_file():
            raise ConfigError(f"no run in {folder}: config.yaml is missing; write the folder that train printed")
        return cls(Path(folder))

    def config(self) -> RunConfig:
        return load(self.folder / "config.yaml")

    def logger(self) -> logging.Logger:
        """Writes to log.txt."""
        logger = logging.getLogger(f"flowbp_ray.{self.folder}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if not logger.handlers:
            handler = logging.FileHandler(self.folder / "log.txt")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
        return logger

    def write_summary(self, summary: dict[str, Any]) -> None:
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def checkpoint_dir(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first. One is finished once its weights are in place."""
        finished = self.checkpoints.glob("step_*/weights.safetensors")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in finished)

    def save_weights(self, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        """Finish the checkpoint of `step` with the published weights; remove all but the newest `keep`."""
        folder = self.checkpoint_dir(step)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "weights.partial"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.rename(folder / "weights.safetensors")
        for old in self.saved_steps()[:-keep]:
            shutil.rmtree(self.checkpoint_dir(old))

    def load_weights(self, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
        """Published weights of a checkpoint (the newest one by default)."""
        steps = self.saved_steps()
        if not steps or (step is not None and step not in steps):
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; there are: {steps or 'none'}")
        step = steps[-1] if step is None else step
        return step, load_file(self.checkpoint_dir(step) / "weights.safetensors")
