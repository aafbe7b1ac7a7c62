"""Where a run's numbers and pictures go besides its folder: the interface of trackers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

LARGEST = 512  # pixels of the longer side of a picture that is sent


@dataclass(frozen=True)
class Shown:
    """Pictures [H, W, 3] uint8 of an evaluation at a guidance, with their prompts."""

    guidance: float
    pictures: tuple[np.ndarray, ...]
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        """What a tracker calls them: held_out/guidance_3."""
        return f"held_out/guidance_{self.guidance:g}"


class Destination(Protocol):
    """A tracker that runs. What goes wrong in it is its own: it raises, and gets nothing more (`Tracker`)."""

    name: str
    """The key of `tracking` that turns it on."""

    def log(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a line of metrics.jsonl by their names (`catalog.grouped`). kind: train, evaluation or
        judge; a judge's may be of an earlier step than what came before."""

    def show(self, step: int, shown: Shown) -> None:
        """Take the pictures of the evaluation after `step` steps."""

    def rewind(self, step: int) -> None:
        """The run goes on from the checkpoint of `step` (-1: from the start): what was logged after it comes again."""

    def close(self) -> None:
        """Send what is left, and end."""


def run_id(folder: Path) -> str:
    """The id of the run in `folder`, the same when it goes on."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def reduced(pictures: Sequence[np.ndarray], prompts: Sequence[str], most: int, guidance: float) -> Shown:
    """At most `most` of the pictures, from all over them, at most LARGEST pixels wide and high."""
    count = min(most, len(pictures))
    chosen = [i * len(pictures) // count for i in range(count)]
    return Shown(guidance, tuple(_smaller(pictures[i]) for i in chosen), tuple(prompts[i] for i in chosen))


def _smaller(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    if max(height, width) <= LARGEST:
        return picture
    scale = LARGEST / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
