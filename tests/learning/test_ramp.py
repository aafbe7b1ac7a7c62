"""The average of the weights whose share rises from 0 (`learners.ema.ramp`), and training from what it draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbp_ray.config.learners import EmaConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.learning.optim import Ema
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Version
from flowbp_ray.utils.digest import digest
from tests.conftest import Saved
from tests.learning.forward_steps import config_of

DECAY, RAMP = 0.5, 0.2


def test_the_share_rises_and_stays() -> None:
    config = EmaConfig(decay=DECAY, ramp=RAMP)
    assert [config.at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.5, 0.5, 0.5])
    assert [EmaConfig(decay=DECAY).at(step) for step in range(3)] == [DECAY] * 3


def test_the_average_has_its_closed_form() -> None:
    """Σ_n (1 − d_n)·w_n·Π_{m>n} d_m, and w_0·Π d_m for the start."""
    shards = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
    ema, path = Ema(shards, EmaConfig(decay=DECAY, ramp=RAMP)), [[s.clone() for s in shards]]
    for step in range(6):
        for shard in shards:
            shard.add_(step + 1.0)
        ema.begin(step)
        ema.update(shards)
        path.append([s.clone() for s in shards])
    kept = [min(DECAY, RAMP * n) for n in range(1, 7)]
    for i, average in enumerate(ema.average):
        want, left = torch.zeros_like(average), 1.0
        for n in range(6, 0, -1):
            want += left * (1 - kept[n - 1]) * path[n][i]
            left *= kept[n - 1]
        torch.testing.assert_close(average, want + left * path[0][i])


@pytest.fixture
def config(saved: Saved, tmp_path: Path) -> RunConfig:
    average = ["nft.policy=average", f"learners.ema.decay={DECAY}", f"learners.ema.ramp={RAMP}", "steps=4"]
    small = ["data.prompts_per_step=1", "data.rollout_batch=3", "learners.micro_batch=3"]
    return config_of("shapes", saved, tmp_path, *average, *small, "learners.optimizer.lr=1e-3")


def masters(loop: LocalLoop) -> list[torch.Tensor]:
    return [m.detach().clone() for m in loop.learner.engine.masters.values()]  # type: ignore[attr-defined]


def averages(loop: LocalLoop) -> list[torch.Tensor]:
    assert loop.learner.engine.ema is not None
    return [a.clone() for a in loop.learner.engine.ema.average]


def test_images_are_drawn_by_the_average_and_a_resumed_learner_goes_on_with_its_share(
    config: RunConfig, tmp_path: Path
) -> None:
    """d[n]·average + (1 − d[n])·weights in every step of a learner; save and load change no bit of what follows."""
    loop, want = LocalLoop(config), ""
    for step in range(4):
        before = averages(loop)
        assert loop.items(step)[0].version == Version(0, step, ema=True)
        loop.step(step)
        share = min(DECAY, RAMP * (step + 1))
        for average, old, new in zip(averages(loop), before, masters(loop), strict=True):
            torch.testing.assert_close(average, share * old + (1 - share) * new, rtol=1e-6, atol=1e-7)
        assert not want or loop.sampler.digest() == want, "the average of the step before drew this step's images"
        want = digest(loop.learner.engine.weights(ema=True))  # type: ignore[attr-defined]
        assert want != loop.learner.digest()
        if step == 1:
            loop.learner.save(str(tmp_path / "saved"))
    again = LocalLoop(config)
    again.learner.load(str(tmp_path / "saved"))
    for step in (2, 3):
        again.step(step)
    assert all(torch.equal(a, b) for a, b in zip(averages(again), averages(loop), strict=True))
    assert again.learner.digest() == loop.learner.digest()


def test_without_a_ramp_the_average_is_another(config: RunConfig) -> None:
    digests = []
    for ema in ({"decay": DECAY}, {"decay": DECAY, "ramp": RAMP}):
        learners = config.learners.model_copy(update={"ema": EmaConfig.model_validate(ema)})
        loop = LocalLoop(config.model_copy(update={"learners": learners}))
        for step in range(2):
            loop.step(step)
        digests.append(loop.learner.digest())
    assert digests[0] != digests[1]
