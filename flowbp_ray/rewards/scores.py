"""Who scores for a reward process: the rewards that it holds itself, or a server at `rewards.url`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Evaluated, Item, Packed, RolloutReport, Scored


class Scores(Protocol):
    """What a reward process holds: a `Scorer`, or a `RemoteScorer`."""

    def reach(self) -> None:
        """Raises `Unavailable` where what scores does not answer at the moment."""
        ...

    def score(self, item: Item, prompts: Sequence[str], report: RolloutReport, target: Packed) -> tuple[Scored, Packed]:
        """See `Scorer.score`."""
        ...

    def pictures(self, target: Packed) -> np.ndarray:
        """See `Scorer.pictures`."""
        ...

    def evaluate(self, item: Item, prompts: Sequence[str], latents: Packed) -> Evaluated:
        """See `Scorer.evaluate`."""
        ...


def open_scorer(config: RunConfig, agreed: Mapping[str, str]) -> Scores:
    """The rewards of `config`: here, or where `rewards.url` says. agreed: what `handshake.check` returned."""
    if config.rewards.url:
        from flowbp_ray.rewards.remote.client import RemoteScorer

        return RemoteScorer(config, agreed)
    from flowbp_ray.rewards.scorer import Scorer

    return Scorer(config.backbone, config.rewards, config.data.shape.batch)
