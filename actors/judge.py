"""The process of a judge: it sends requests to the judge's server, and starts that server if it is our own."""

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

from actors.process import hiding_errors
from flowbp_ray.judges.client import Answers
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.judge import Judge
from flowbp_ray.judges.tail import ReadOffset, read_on
from flowbp_ray.utils.tracebacks import hide_in_tracebacks


@hiding_errors
class JudgeActor:
    """The actor around a `Judge`. The GPUs that Ray assigns to this process are used by the server.

    A server of our own writes its log on this node. `said` returns the log's new part, also while another call runs.
    """

    def __init__(self, config: JudgeConfig, token: str, shown: str) -> None:
        """token: unique to this judge in this run, so that a restarted process on this node continues the same log.

        shown: the log's path in the run's folder, for messages.
        The API key comes with each call: Ray keeps a constructor's arguments, in Redis where its control store has one.
        """
        hide_in_tracebacks()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
        self.log = Path(tempfile.gettempdir()) / f"flowbp-ray-judge-{token}" / "server.log"
        self.judge = Judge(config, self.log, shown=Path(shown))

    def score(self, key: str | None, images: np.ndarray, prompts: list[str], seeds: list[tuple[int, ...]]) -> Answers:
        """Return the judge's answers about images [n, H, W, 3] uint8."""
        self.judge.use(key)
        return self.judge.score(list(images), prompts, seeds)

    def weights(
        self,
        key: str | None,
        rows: Sequence[int],
        prompts: list[str],
        seeds: list[tuple[int, ...]],
        *parts: np.ndarray,
    ) -> tuple[float, ...]:
        """Return a gate's weights of the rows `rows` of the batch. parts: the batch's pictures, one part per item."""
        self.judge.use(key)
        images = [image for part in parts for image in part]
        return self.judge.weights([images[row] for row in rows], prompts, seeds)

    def scores(
        self,
        key: str | None,
        rows: Sequence[int],
        prompts: list[str],
        seeds: list[tuple[int, ...]],
        *parts: np.ndarray,
    ) -> Answers:
        """Return the judge's answers about the rows `rows` of the batch. parts: its pictures, one part per item."""
        self.judge.use(key)
        images = [image for part in parts for image in part]
        return self.judge.score([images[row] for row in rows], prompts, seeds)

    @ray.method(concurrency_group="log")
    def said(self, mark: ReadOffset) -> tuple[bytes, ReadOffset]:
        """Return the server's log after the mark, and the new mark."""
        return read_on(self.log, mark)

    @ray.method(concurrency_group="log")
    def forget(self) -> None:
        """Delete the log on this node, after it has been copied."""
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def pid(self) -> int:
        return os.getpid()


RemoteJudge: Any = ray.remote(concurrency_groups={"log": 1})(JudgeActor)  # type: ignore[call-overload]
