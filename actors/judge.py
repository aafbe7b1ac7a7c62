"""A judge's process: it asks, and starts the server where that is ours."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from flowbp_ray.judges.client import Answers
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.judge import Judge
from flowbp_ray.judges.tail import ReadOffset, read_on


class JudgeActor:
    """Holds a `Judge`. The GPUs that Ray gives this process are the server's.

    A server of our own writes its log on this node; `said` hands it over, beside a call that is under way.
    """

    def __init__(self, config: JudgeConfig, token: str, shown: str, key: str | None) -> None:
        """token: of this judge in this run alone: the next process on this node goes on with the same log."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
        self.log = Path(tempfile.gettempdir()) / f"flowbp-ray-judge-{token}" / "server.log"
        self.judge = Judge(config, self.log, key, Path(shown))

    def score(self, images: np.ndarray, prompts: list[str], seeds: list[tuple[int, ...]]) -> Answers:
        """Answers about images [n, H, W, 3] uint8."""
        return self.judge.score(list(images), prompts, seeds)

    def weights(
        self, rows: Sequence[int], prompts: list[str], seeds: list[tuple[int, ...]], *parts: np.ndarray
    ) -> tuple[float, ...]:
        """A gate's weights of these rows of the batch, whose pictures come in parts."""
        images = [image for part in parts for image in part]
        return self.judge.weights([images[row] for row in rows], prompts, seeds)

    @ray.method(concurrency_group="log")
    def said(self, mark: ReadOffset) -> tuple[bytes, ReadOffset]:
        """What the server wrote since the mark, and how far that is."""
        return read_on(self.log, mark)

    @ray.method(concurrency_group="log")
    def forget(self) -> None:
        """Remove the log from this node: somebody has it."""
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def pid(self) -> int:
        return os.getpid()


RemoteJudge: Any = ray.remote(concurrency_groups={"log": 1})(JudgeActor)  # type: ignore[call-overload]
