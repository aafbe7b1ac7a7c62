"""Learning from scores without gradient, in one process on tiny models: the learner's gradient against autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowbp_ray.backbones import Embeddings
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Optimality, pack, unpack
from flowbp_ray.utils import random
from tests.backbones import tiny
from tests.conftest import Saved
from tests.learning.forward_steps import LORA, RED, Red, Step, config_of, optimality_of, relative

EACH = [1.0] * 6
CASES: list[tuple[str, list[str]]] = [
    ("shapes", []),
    ("shapes", ["backbone.guidance=3", "nft.beta=0.1", "nft.clip=1", "nft.times=3"]),
    ("shapes", [*LORA, "nft.beta=0.5"]),
    ("sd35", ["backbone.guidance=3", *LORA]),
    ("flux1", ["backbone.guidance=3.5"]),
    ("flux1", [*LORA, "backbone.guidance=2"]),
    ("flux2", ["nft.beta=0.1"]),
    ("qwen_image", ["backbone.guidance=4"]),
]


@pytest.mark.parametrize("family, more", CASES, ids=[f"{f}-{len(m)}-{i}" for i, (f, m) in enumerate(CASES)])
def test_the_gradient_is_that_of_autograd_on_the_written_loss(
    saved: Saved, tmp_path: Path, family: str, more: list[str]
) -> None:
    """From the scores to the parameters, with a learner that is away from the policy that drew; guidance or none."""
    step = Step.of(LocalLoop(config_of(family, saved, tmp_path, *more)))
    [item] = step.items
    images = step.loop.scorer.decode(unpack(item.rollout.finished).float())
    r = optimality_of(Red().score(images, []).tolist(), 3, step.loop.config.nft.clip)
    assert step.optimality is not None and step.optimality.rows == pytest.approx(r, abs=1e-6)
    assert len({round(value, 3) for value in r}) > 3, "rows differ, or the test sees little"
    report, found = step.all()
    want = step.written_out(step.optimality.rows, EACH)
    assert relative(found, want) <= 1e-5
    assert not report.faults and report.grad_norm > 0
    assert report.forwards == 3 * step.loop.config.nft.times and report.padding == 0


def test_from_the_policy_itself_too(saved: Saved, tmp_path: Path) -> None:
    """v = v_old, as in a run's first step: only the scores pull."""
    step = Step.of(LocalLoop(config_of("shapes", saved, tmp_path)), away=False)
    report, found = step.all()
    assert step.optimality is not None
    assert relative(found, step.written_out(step.optimality.rows, EACH)) <= 1e-5
    assert max(report.old_distance) < 1e-9


@pytest.mark.parametrize("more", [
    ["learners.micro_batch=6"],
    ["learners.micro_batch=1"],
    ["learners.micro_batch=2", "learners.fuse=2"],
    ["learners.micro_batch=3", "learners.fuse=64"],
    ["data.rollout_batch=1"],
    ["data.rollout_batch=3"],
    ["learners.gradient_checkpointing=true"],
], ids=" ".join)  # fmt: skip
def test_how_the_rows_are_split_does_not_matter(saved: Saved, tmp_path: Path, more: list[str]) -> None:
    whole = Step.of(LocalLoop(config_of("shapes", saved, tmp_path / "a", "learners.micro_batch=2")))
    split = Step.of(LocalLoop(config_of("shapes", saved, tmp_path / "b", *more)))
    (report, found), (_, want) = split.all(), whole.all()
    assert relative(found, want) <= 1e-5
    at_once = split.loop.config.learners.micro_batch * split.loop.config.learners.fuse
    assert report.forwards == math.ceil(12 / at_once) and report.rows == 12


def test_rows_that_are_left_out_cost_no_forward(saved: Saved, tmp_path: Path) -> None:
    """A masked row, and one that teaches nothing; rows that only pad, as beside a rank with more, change nothing."""
    step = Step.of(LocalLoop(config_of("shapes", saved, tmp_path)))
    r, factors = (0.1, math.nan, 0.7, math.nan, math.nan, 0.9), [2.0, 0.0, 2.0, 2.0, 0.0, 2.0]
    report, found = step.gradient(Optimality(r, 1.0, 6), factors)
    assert (report.forwards, report.rows, report.padding) == (3, 6, 0)
    assert relative(found, step.written_out(r, factors)) <= 1e-5
    assert [math.isnan(x) for x in report.forward_loss] == [math.isnan(x) for x in r]
    padded, same = step.gradient(Optimality(r, 1.0, 9), factors)
    assert (padded.forwards, padded.rows, padded.padding) == (5, 9, 3)
    assert relative(same, found) <= 1e-6 and padded.forward_loss == pytest.approx(report.forward_loss, nan_ok=True)
    idle, nothing = step.gradient(Optimality((math.nan,) * 6, 1.0, 4), factors)
    assert (idle.forwards, idle.padding) == (2, 4) and not nothing.any() and not idle.faults


def test_prompts_whose_images_score_alike_are_skipped(saved: Saved, tmp_path: Path) -> None:
    """Of the verifier's scores, which are 0 or 1: the driver's own selection, forwards counted."""
    terms = "rewards.terms=[{name: shapes_verifier, gradient: none}]"
    more = [terms, "data.prompts_per_step=4", "seed=2"]
    step = Step.of(LocalLoop(config_of("shapes", saved, tmp_path, *more)))
    scores = [row[0] for item in step.items for row in item.result.scores["shapes_verifier"]]
    groups = [scores[i : i + 3] for i in range(0, 12, 3)]
    active = [len(set(group)) > 1 for group in groups]
    assert 0 < sum(active) < 4, "some prompts teach, some do not"
    report, found = step.all()
    assert report.rows == 2 * 3 * sum(active) and step.optimality is not None
    assert [math.isnan(r) for r in step.optimality.rows] == [not flag for flag in active for _ in range(3)]
    assert relative(found, step.written_out(step.optimality.rows, [1.0] * 12)) <= 1e-5


@pytest.mark.parametrize("method", ["flowbp_sparse", "flowbp_bridge"])
def test_a_mixed_step_is_the_sum_of_both_parts(saved: Saved, tmp_path: Path, method: str) -> None:
    """The surrogate's gradient, without the terms that only score, plus the weight times the written loss."""
    chosen = f"method={{name: {method}, k: 2}}"
    clip = "{name: shapes_clip, clip: 3.0}"
    red = RED.replace("}", ", weight: 0.3}")
    mixed = Step.of(LocalLoop(config_of("shapes", saved, tmp_path / "a", chosen, f"rewards.terms=[{clip}, {red}]")))
    alone = Step.of(LocalLoop(config_of("shapes", saved, tmp_path / "b", chosen, f"rewards.terms=[{clip}]")))
    assert torch.equal(unpack(mixed.cotangents[0]), unpack(alone.cotangents[0]))
    (report, both), (plain, surrogate) = mixed.all(), alone.all()
    assert mixed.optimality is not None
    want = surrogate + 0.3 * mixed.written_out(mixed.optimality.rows, EACH)
    assert relative(both, want) <= 1e-5
    assert report.forwards == plain.forwards + 6
    assert float((both - surrogate).norm()) > 1e-3 * float(surrogate.norm())


def test_the_base_penalty_alone_in_a_pure_run(saved: Saved, tmp_path: Path) -> None:
    """Weight times the mean square of v − v_base at the noised samples, and the distance that is reported."""
    loop = LocalLoop(config_of("shapes", saved, tmp_path, "learners.base_penalty.weight=0.7", "backbone.guidance=3"))
    step = Step.of(loop)
    report, found = step.all()
    assert step.optimality is not None
    want = step.written_out(step.optimality.rows, EACH, penalty=0.7)
    assert relative(found, want) <= 1e-5
    part = want - step.written_out(step.optimality.rows, EACH)
    assert float(part.norm()) > 1e-3 * float(want.norm())
    assert len(report.base_distance) == 6 and min(report.base_distance) > 0


def test_guidance_draws_the_samples_and_is_not_learned(saved: Saved, tmp_path: Path) -> None:
    """Other samples than without guidance; of the same samples the negative branch changes nothing."""
    drawn = []
    for guidance in (1, 3):
        step = Step.of(LocalLoop(config_of("shapes", saved, tmp_path / str(guidance), f"backbone.guidance={guidance}")))
        drawn.append(unpack(step.items[0].rollout.finished))
    assert relative(drawn[1], drawn[0]) > 0.05
    learner, before = step.loop.learner, step.all()[1]
    known = dict(learner.embeddings.prompts)
    negative = {name: torch.full_like(tensor, torch.nan) for name, tensor in known[-1].items()}
    learner.embeddings = Embeddings(known | {-1: negative})
    assert torch.equal(step.all()[1], before)


def test_embedded_guidance_is_an_input_of_what_is_learned(saved: Saved, tmp_path: Path) -> None:
    """FLUX.1: the learner's forward has the run's guidance; with another one the gradient differs."""
    step = Step.of(LocalLoop(config_of("flux1", saved, tmp_path, "backbone.guidance=3.5")))
    found = step.all()[1]
    first = step.items[0]
    other = replace(first.rollout, item=replace(first.item, guidance=1.0))
    step.items[0] = replace(first, rollout=other)
    assert relative(step.all()[1], found) > 1e-3


@pytest.mark.parametrize("family", [*tiny.NAMES, "shapes"])
def test_half_precision_runs_and_is_near(saved: Saved, tmp_path: Path, family: str) -> None:
    """bf16 weights and states: the gradient is near that of the written loss on the same bf16 models."""
    step = Step.of(LocalLoop(config_of(family, saved, tmp_path, "backbone.dtype=bfloat16", *LORA)))
    report, found = step.all()
    assert step.optimality is not None and not report.faults
    assert relative(found, step.written_out(step.optimality.rows, EACH)) <= 0.08
    loop = LocalLoop(config_of(family, saved, tmp_path / "b", "backbone.dtype=bfloat16"))
    before = loop.learner.digest()
    assert loop.step(0).grad_norm > 0 and loop.learner.digest() != before


def test_the_samplers_part_is_what_the_learner_regenerates(saved: Saved, tmp_path: Path) -> None:
    """x0 are the targets that were scored, the old velocities those of the model that drew, at the keyed states."""
    loop = LocalLoop(config_of("shapes", saved, tmp_path, "backbone.guidance=3", "data.rollout_batch=3"))
    published = list(loop.learner.publish())
    for item in loop.items(0):
        report, rollout, target = loop.sampler.rollout(item, lambda: published)
        assert rollout.finished is not None and rollout.old is not None
        x0, old = unpack(rollout.finished), unpack(rollout.old).unflatten(0, (3, 2))
        assert torch.equal(x0, unpack(target)[:, 0]) and not unpack(rollout.states).numel()
        assert report.forward_bytes == rollout.finished.nbytes + rollout.old.nbytes
        for place, sample in enumerate(item.samples):
            eps = random.stream(item.seed, "forward", 0, sample).standard_normal((2, 8, 8, 8), dtype="float32")
            for k, node in enumerate(item.times[place]):
                t = loop.learner.sigmas[node]
                x_t = (1 - t) * x0[place] + t * torch.from_numpy(eps[k])
                cond = loop.learner.embeddings.rows([item.prompt_ids[place]])
                with torch.no_grad():
                    want = loop.sampler.backbone.predict(loop.sampler.transformer, x_t[None], t[None], cond)[0]
                assert relative(old[place, k], want) <= 1e-5


def test_a_velocity_of_the_learner_that_is_not_finite_is_named(saved: Saved, tmp_path: Path) -> None:
    step = Step.of(LocalLoop(config_of("shapes", saved, tmp_path)))
    first = step.items[0]
    x0 = unpack(first.rollout.finished).clone()
    x0[4] = 1e38
    step.items[0] = replace(first, rollout=replace(first.rollout, finished=pack(x0)))
    assert step.chosen is not None
    report = step.loop.learner.step(0, step.rollouts, step.cotangents, EACH, (), step.optimality)
    assert not math.isfinite(report.grad_norm)
    assert {(fault.what, fault.sample) for fault in report.faults} == {("learner velocity", 4)}


def test_a_step_that_teaches_nothing_changes_nothing(saved: Saved, tmp_path: Path) -> None:
    """All prompts score alike: neither the weights nor their average move, as on Ray."""
    terms = "rewards.terms=[{name: flat, kind: 'tests.learning.test_forward:Flat', gradient: none}]"
    loop = LocalLoop(config_of("shapes", saved, tmp_path, terms, "learners.ema.decay=0.5", "nft.policy=average"))
    Step.of(loop)  # which moves the weights away from their average
    engine = loop.learner.engine
    before, averages = loop.learner.digest(), [a.clone() for a in engine.ema.average]  # type: ignore[union-attr]
    report = loop.step(0)
    assert report.forwards == 0 and loop.learner.digest() == before
    assert all(torch.equal(a, b) for a, b in zip(engine.ema.average, averages, strict=True))  # type: ignore[union-attr]


class Flat(Red):
    """All pictures score alike."""

    def score(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
        return torch.full((len(images),), 0.1)
