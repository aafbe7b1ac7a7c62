"""A judge's process: it asks, and starts the server where that is ours."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from flowbp_ray.judges.client import Answers
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.judge import Judge


class JudgeActor:
    """Holds a `Judge`. The GPUs that Ray gives this process are the server's."""

    def __init__(self, config: JudgeConfig, log: str, key: str | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
        self.judge = Judge(config, Path(log), key)

    def score(self, images: np.ndarray, prompts: list[str], seeds: list[tuple[int, ...]]) -> Answers:
        """Answers about images [n, H, W, 3] uint8."""
        return self.judge.score(list(images), prompts, seeds)

    def weights(
        self, rows: Sequence[int], prompts: list[str], seeds: list[tuple[int, ...]], *parts: np.ndarray
    ) -> tuple[float, ...]:
        """A gate's weights of these rows of the batch, whose pictures come in parts."""
        images = [image for part in parts for image in part]
        return self.judge.weights([images[row] for row in rows], prompts, seeds)

    def pid(self) -> int:
        return os.getpid()


RemoteJudge: Any = ray.remote(JudgeActor)
