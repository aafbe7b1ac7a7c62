"""A learner rank and samplers without Ray: versions by broadcast, older ones from rank 0's copies."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.learning.broadcaster import Broadcaster
from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.messages import Version
from flowbp_ray.weights import buckets
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.inbox import Inbox
from flowbp_ray.weights.packing import Receiver
from flowbp_ray.weights.trainable import trained

TIMEOUT = 60.0


def step(engine: TorchEngine) -> str:
    """One update; the fingerprint that the learners state for the weights after it."""
    engine.backward(engine.module(torch.ones(2, 5, dtype=torch.bfloat16)).float().square().sum(), True)
    engine.step(1e-2)
    return fingerprint(engine.weights())


@pytest.mark.parametrize("staleness", [0, 2])
def test_late_samplers_get_the_version_that_an_item_names(staleness: int, monkeypatch: Any) -> None:
    """One sampler takes part, one comes late and installs what rank 0 keeps (S > 0), or still has (S = 0)."""
    monkeypatch.setattr(buckets, "BUCKET", 40)
    torch.manual_seed(0)
    learner, sampler, late = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16() for _ in range(3))
    engine = TorchEngine(learner, LearnersConfig(micro_batch=1, engine="torch"))
    kept = staleness + 1 if staleness else 0
    rank = Broadcaster(engine, 0, "cpu", kept, "127.0.0.1", TIMEOUT)
    inbox = Inbox(Receiver(sampler), "127.0.0.1", rank.port, "s", threading.Lock(), staleness, patience=10.0)
    stated: dict[int, str] = {}
    for number in range(1, 5):
        stated[number] = step(engine)
        delivery = rank.broadcast(Version(0, number), ["s"])
        assert delivery.seats == ("s",) and not delivery.error and delivery.seconds > 0
        oldest = max(1, number - staleness)  # what a batch of the next step may name
        for version in range(max(oldest, number - 1), number + 1):
            if inbox.install(Version(0, version)):
                assert fingerprint(trained(sampler)) == stated[version]
        for version in range(oldest, number + 1) if kept else ():
            Receiver(late).install(list(rank.read(Version(0, version))))
            assert fingerprint(trained(late)) == stated[version]
    assert fingerprint(trained(sampler)) == stated[4] and len(rank.kept) == kept
    with pytest.raises(KeyError):
        list(rank.read(Version(0, 1)))


def test_other_ranks_only_gather() -> None:
    engine = TorchEngine(nn.Linear(5, 3), LearnersConfig(micro_batch=1, engine="torch"))
    rank = Broadcaster(engine, 1, "cpu", 2, "127.0.0.1", TIMEOUT)
    assert rank.port == 0 and rank.broadcast(Version(0, 1), ["s"]).seats == () and not rank.kept
