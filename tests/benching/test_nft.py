"""Emulated actors of a run with terms without gradient: what they send has the sizes of the real ones'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.emulated import EmulatedLearner, EmulatedReward, EmulatedSampler
from benchmarks.make_profile import profile_of
from flowbp_ray.benching import profile
from flowbp_ray.benching.measure import bench
from flowbp_ray.config import loading
from flowbp_ray.control.selection import select
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Packed, Rollout, ScoredItem
from flowbp_ray.utils.errors import ConfigError
from tests.small import small_config

SCORED = "{name: shapes_clip_heldout, gradient: none}"
GROUPS = ["data.images_per_prompt=2", "data.prompts_per_step=2"]
PURE = ["method=null", f"rewards.terms=[{SCORED}]", *GROUPS]
KINDS = {
    "pure": PURE,
    "pure, with the base": [*PURE, "learners.base_penalty.weight=1", "backbone.guidance=2"],
    "pure, with the base guided": [*PURE, "learners.base_penalty={weight: 1, guidance: 3}"],
    "mixed": [f"rewards.terms=[{{name: shapes_clip}}, {SCORED}]", *GROUPS],
}


def sizes(packed: Packed | None) -> Any:
    return None if packed is None else (packed.array.shape, packed.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_have_the_sizes_of_the_real_ones(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.emulated.signal.signal", lambda *_: None)
    config = small_config(tmp_path, "flowbp_sparse", *KINDS[kind])
    loop, given = LocalLoop(config), profile_of(config, "here", 1e15, 1.0)
    emulation = given.scaled(1e-3, 1.0).emulation(config)
    assert emulation.sampler_s == given.sampler_s * 1e-3 and emulation.learner_s == given.learner_s * 1e-3
    sampler, reward, learner = EmulatedSampler(emulation), EmulatedReward(emulation), EmulatedLearner()
    learner.build(emulation, 0, "", 0)
    published = list(loop.learner.publish())
    items, messages = [], []
    for item in loop.items(0):
        sampler.version = item.version  # so that no weights are fetched
        (report, rollout, target), texts = sampler.rollout(item, [], []), [loop.texts[i] for i in item.prompt_ids]
        real_report, real, real_target = loop.sampler.rollout(item, lambda: published)
        for name in ("states", "velocities", "base", "finished", "old"):
            assert sizes(getattr(rollout, name)) == sizes(getattr(real, name)), name
        assert sizes(target) == sizes(real_target)
        for name in ("forward_bytes", "state_bytes", "base_bytes", "target_bytes"):
            assert getattr(report, name) == getattr(real_report, name), name
        scored, cotangent = reward.score(item, texts, report, target)
        real_scored, real_cotangent = loop.scorer.score(item, texts, real_report, real_target)
        assert sizes(cotangent) == sizes(real_cotangent) and np.shape(scored.gram) == np.shape(real_scored.gram)
        assert list(scored.scores) == list(real_scored.scores) and scored.clipped.keys() == real_scored.clipped.keys()
        items.append(ScoredItem(item, report, scored, rollout, cotangent))
        messages += [rollout, cotangent]
    chosen = select(items, [], config.rewards).beside(items, config)
    [optimality] = chosen.optimality(1, config)
    assert chosen.trains and optimality is not None and optimality.slots == 4 * 2
    found = learner.step(0, chosen.factors, chosen.shares, optimality, *messages)
    states = sum(len(message.states.array) for message in messages if isinstance(message, Rollout))
    assert found.forwards == states + 8 and states == (4 * 4 if kind == "mixed" else 0)
    real_step = loop.step(0)
    for name in ("forward_loss", "old_distance", "signal", "base_distance"):
        assert (
            len(getattr(found, name))
            == len(getattr(real_step, name))
            == (4 if name != "base_distance" or "base" in kind else 0)
        ), name
    assert emulation.node_s == pytest.approx(emulation.learner_s / 4 * (4 / 6 if kind == "mixed" else 0))


def test_further_forwards_take_their_seconds(tmp_path: Path) -> None:
    """By hand: 25 steps of two branches and T further rows of a sampler; 4 nodes and T further ones of a learner."""
    given, base = profile.load("sd35_m_h100"), loading.load("sd35_flowbp_sparse")
    terms = "rewards.terms=[{name: hpsv2}, {name: clipscore, gradient: none}]"
    settings = [
        f"backbone.path={given.write_model(tmp_path)}",
        terms,
        "rewards.monitors=[]",
        "data.images_per_prompt=2",
    ]
    plain = given.emulation(base)
    for times in (1, 3):
        found = given.emulation(loading.load("sd35_flowbp_sparse", [*settings, f"nft.times={times}"]))
        assert found.sampler_s == pytest.approx(plain.sampler_s * (50 + times) / 50)
        assert found.learner_s == pytest.approx(plain.learner_s * (4 + times) / 4)
        assert found.node_s == pytest.approx(plain.node_s) and found.reward_s == plain.reward_s
    with pytest.raises(ConfigError, match=r"was computed with method=.*, this run has None"):
        given.emulation(
            loading.load(
                "sd35_flowbp_sparse", [*settings, "method=null", terms.replace("hpsv2", "hpsv2, gradient: none")]
            )
        )


@pytest.mark.parametrize(("held", "rows"), [("null", 1), (3, 2)])
def test_a_guided_base_takes_its_seconds(tmp_path: Path, held: str | int, rows: int) -> None:
    """By hand: of an image six steps, and for each time a forward of the policy and `rows` of the base."""
    shared = [*PURE, f"learners.base_penalty={{weight: 1, guidance: {held}}}"]
    one = small_config(tmp_path, "flowbp_sparse", *shared, "nft.times=1")
    given = profile_of(one, "here", 1e15, 1.0)
    for times in (1, 3):
        found = given.emulation(small_config(tmp_path, "flowbp_sparse", *shared, f"nft.times={times}"))
        more = (6 + times * (1 + rows)) / (6 + 1 + rows)
        assert found.sampler_s == pytest.approx(given.sampler_s * given.time_scale * more)
    other = small_config(tmp_path, "flowbp_sparse", *shared, "learners.base_penalty.guidance=5")
    with pytest.raises(ConfigError, match=r"learners.base_penalty.guidance=.*, this run has 5.0"):
        given.emulation(other)


def test_a_judge_to_learn_from_is_refused(tmp_path: Path) -> None:
    judge = "judges=[{name: look, url: 'http://127.0.0.1:9', template: {kind: yes_no}, role: reward}]"
    settings = [*PURE, "rewards.terms=[{name: look, kind: judge, gradient: none}]", judge, "data.rollout_batch=4"]
    settings += ["learners.micro_batch=4", "learners.count=1", "learners.engine=torch"]
    with pytest.raises(
        ConfigError, match=r"rewards.terms has 'look', which a judge scores, and bench runs none; write"
    ):
        bench("shapes_flowbp_sparse", settings, [["staleness=0"]], 1.0, lambda *_: pytest.fail("it was opened"))
