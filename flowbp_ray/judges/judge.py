"""A judge without Ray: its server where that is ours, its client, and how a missing answer is treated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowbp_ray.judges.client import Answers, Client, Place, RequestPolicy
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.server import Server
from flowbp_ray.utils.errors import RunFailed


class Judge:
    """Scores pictures. `close` ends a server of our own (which also ends with this process)."""

    def __init__(self, config: JudgeConfig, log: Path, key: str | None = None, shown: Path | None = None) -> None:
        """log: where a server of our own writes. key: the server's API key. shown: where people find the log."""
        self.config = config
        self.loop = asyncio.new_event_loop()
        self.server = None if config.model is None else Server(config.model, config.server, log, key, shown)
        limits = RequestPolicy(config.concurrency, config.timeout, config.tries, config.backoff)
        self.client = Client(self._locate, config.template, limits, key, config.request)

    def use(self, key: str | None) -> None:
        """Use this API key from now on."""
        self.client.key = key
        if self.server is not None:
            self.server.key = key

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str], seeds: Sequence[Sequence[int]]) -> Answers:
        """Scores of images [H, W, 3] uint8; NaN where there is no answer (see `Answers.missing`)."""
        if self.server is not None:
            self.server.given_up = None  # another call, another chance
        return self.loop.run_until_complete(self.client.ask(images, prompts, seeds))

    def weights(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], seeds: Sequence[Sequence[int]]
    ) -> tuple[float, ...]:
        """A gate's weight in [0, 1] per picture: clip((score − low) / (high − low), 0, 1).

        Raises RunFailed where a picture has no score: a gate that cannot see must not decide.
        """
        answers = self.score(images, prompts, seeds)
        if answers.missing:
            _, why = answers.missing[0]
            more = f" ({len(answers.missing)} of {len(images)} samples)" if len(images) > 1 else ""
            raise RunFailed(f"gate {self.config.name!r} has no answer{more}: {why}")
        score, low, high = self.config.gate_bounds
        return tuple(float(np.clip((value - low) / (high - low), 0.0, 1.0)) for value in answers.scores[score])

    def start(self) -> None:
        """Start a server of our own and wait until it is up. Raises RunFailed where it does not come up."""
        self.loop.run_until_complete(self._locate(False))

    def close(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.loop.close()

    async def _locate(self, doubt: bool) -> Place:
        if self.server is not None:
            return Place(await self.server.ensure(doubt), self.server.served_as)
        assert self.config.url is not None
        return Place(self.config.url, self.config.served_as)
