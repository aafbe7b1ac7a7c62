"""A reward that takes its time, and says when it has begun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


class Slow:
    """The mean of each image, after the file `gate` is there; writes a line to `begun` first."""

    name = "slow"

    def __init__(self, begun: str, gate: str) -> None:
        self.begun, self.gate = Path(begun), Path(gate)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward`."""
        with self.begun.open("a") as file:
            file.write(f"{len(prompts)}\n")
        until = time.monotonic() + 200
        while not self.gate.exists() and time.monotonic() < until:
            time.sleep(0.02)
        return images.flatten(1).mean(1)
