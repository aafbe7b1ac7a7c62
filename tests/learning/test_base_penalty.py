"""Staying near the base, on the embedded model in one process: the learner's gradient, the distance, what drops out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones import Embeddings
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.selection import Selection
from flowbp_ray.local import LocalLoop, encode
from flowbp_ray.messages import Item, Packed, Rollout, ScoredItem, StepReport, pack, unpack
from flowbp_ray.observability.step_metrics import step_metrics
from flowbp_ray.rewards.balance import gram
from flowbp_ray.rollout.execute import run_item
from flowbp_ray.rollout.items import noise_of
from flowbp_ray.rollout.sampler import build_sampler
from flowbp_ray.utils.digest import digest
from flowbp_ray.weights import trainable
from flowbp_ray.weights.packing import PackedTensors, merge_tensors
from tests.small import small_config

TEXTS = ["a red circle", "two blue squares", "a green triangle", "three yellow circles"]
LORA = ["learners.lora={rank: 4, alpha: 8}"]
G = 3.0


def config(tmp_path: Path, *overrides: str, method: str = "flowbp_bridge") -> RunConfig:
    """Four rows with plans of their own, in two items; no score reaches the clip, so that every row has a gradient."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    own = ["method.k=3", "method.draws=per_sample"] if method == "flowbp_bridge" else []
    own += [f"data.prompts={tmp_path}/prompts.txt", "rewards.terms=[{name: shapes_clip, clip: 3.0}]"]
    return small_config(tmp_path, method, *own, *overrides)


def moved(loop: LocalLoop) -> LocalLoop:
    """The learner some way from the base, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable.trained(loop.learner.engine.module).values():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return loop


@dataclass
class Step:
    """The inputs of an optimizer step, and the gradient that it summed."""

    loop: LocalLoop
    items: list[ScoredItem]
    rollouts: list[Rollout]
    cotangents: list[Packed]

    @staticmethod
    def of(loop: LocalLoop) -> Step:
        published, step = [PackedTensors.of(loop.learner.engine.weights())], Step(loop, [], [], [])
        for item in loop.items(0):
            report, rollout, target = loop.sampler.rollout(item, lambda: published)
            scored, cotangent = loop.scorer.score(item, [loop.texts[i] for i in item.prompt_ids], report, target)
            step.items.append(ScoredItem(item, report, scored))
            step.rollouts.append(rollout)
            step.cotangents.append(cotangent)
        return step

    def gradient(self, factors: list[float]) -> tuple[StepReport, Tensor]:
        """What is summed when the engine is asked to step; nothing is updated."""
        engine, found = self.loop.learner.engine, []

        def read(rate: float) -> float:
            rows = [p.grad for p in trainable.trained(engine.module).values()]
            found.append(torch.cat([torch.zeros(1) if g is None else g.double().flatten() for g in rows]))
            engine.module.zero_grad(set_to_none=True)
            return float(found[0].norm())

        engine.step = read  # type: ignore[method-assign]
        report = self.loop.learner.step(0, self.rollouts, self.cotangents, factors)
        return report, found[0]

    def written_out(self, factors: list[float], weight: float, guidance: float, detach: bool) -> tuple[Tensor, float]:
        """The gradient of the penalty by autograd, with a base of its own from the files; and its value."""
        learner, backbone = self.loop.learner, backbone_named("shapes")
        base, module = backbone.load_transformer(torch.float32), learner.engine.module
        total, row = torch.zeros(()), 0
        for rollout in self.rollouts:
            states, place = unpack(rollout.states), 0
            for plan, prompt in zip(rollout.item.plans, rollout.item.prompt_ids, strict=True):
                squares = []
                for node, _ in plan.states:
                    x, sigma = states[place : place + 1], learner.sigmas[node : node + 1]
                    cond, neg = learner.embeddings.rows([prompt]), learner.embeddings.negative(1)
                    away = guidance * (
                        backbone.predict(module, x, sigma, cond) - backbone.predict(base, x, sigma, cond)
                    )
                    if guidance > 1 and not detach:
                        other = backbone.predict(module, x, sigma, neg) - backbone.predict(base, x, sigma, neg)
                        away = away + (1 - guidance) * other
                    squares.append(away.square().mean())
                    place += 1
                total = total + factors[row] / len(factors) * weight * torch.stack(squares).mean()
                row += 1
        parameters = list(trainable.trained(module).values())
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        flat = [torch.zeros(1) if g is None else g.double().flatten() for g in found]
        return torch.cat(flat), float(total.detach())


@pytest.mark.parametrize("kind, guidance, detach, fuse, micro_batch, method", [
    ("full", 1.0, True, 1, 1, "flowbp_bridge"),
    ("full", G, True, 64, 2, "flowbp_lagrange"),
    ("lora", G, True, 1, 2, "flowbp_bridge"),
    ("lora", G, False, 64, 4, "flowbp_sparse"),
])  # fmt: skip
def test_the_learner_adds_the_gradient_of_the_penalty(
    tmp_path: Path, kind: str, guidance: float, detach: bool, fuse: int, micro_batch: int, method: str
) -> None:
    """With one row masked; however the rows are split and the nodes stacked."""
    weight, factors = 0.5, [4 / 3, 0.0, 4 / 3, 4 / 3]
    shared = [f"backbone.guidance={guidance}", f"backbone.detach_negative={str(detach).lower()}"]
    shared += [f"learners.fuse={fuse}", f"learners.micro_batch={micro_batch}", *(LORA if kind == "lora" else [])]
    penalised = config(tmp_path, *shared, f"learners.base_penalty.weight={weight}", method=method)
    step = Step.of(moved(LocalLoop(penalised)))
    plain = Step.of(moved(LocalLoop(config(tmp_path, *shared, method=method))))
    report, both = step.gradient(factors)
    plain_report, reward = plain.gradient(factors)
    assert report.forwards == plain_report.forwards
    want, value = step.written_out(factors, weight, guidance, detach)
    assert float((both - reward - want).norm()) <= 1e-4 * float(want.norm())
    assert float(want.norm()) > 1e-2 * float(reward.norm()) > 0
    chosen = Selection(tuple(factors), 3, (), gram([item.result for item in step.items], factors))
    metrics = step_metrics(step.items, [report], chosen, (), penalised)
    assert metrics["base_penalty"] == pytest.approx(value, rel=1e-4)
    assert metrics["base_distance"] == pytest.approx((value / weight) ** 0.5, rel=1e-4)
    unmeasured = step_metrics(plain.items, [plain_report], chosen, (), penalised)
    assert "base_penalty" not in unmeasured


def test_a_masked_row_s_base_does_not_matter(tmp_path: Path) -> None:
    step = Step.of(moved(LocalLoop(config(tmp_path, "learners.base_penalty.weight=10"))))
    factors = [0.0, 4 / 3, 4 / 3, 4 / 3]
    _, before = step.gradient(factors)
    first = step.rollouts[0]
    assert first.base is not None
    base = unpack(first.base).clone()
    base[: len(first.item.plans[0].states)] += 100.0
    step.rollouts[0] = replace(first, base=pack(base))
    _, after = step.gradient(factors)
    assert torch.equal(before, after)
    _, counted = step.gradient([1.0] * 4)
    assert float((counted - before).norm()) > float(before.norm())


def test_a_gradient_that_the_penalty_makes_infinite_is_named(tmp_path: Path) -> None:
    step = Step.of(moved(LocalLoop(config(tmp_path, "learners.base_penalty.weight=1"))))
    first = step.rollouts[0]
    assert first.base is not None
    base = unpack(first.base).clone()
    base[len(first.item.plans[0].states) :] = 1e30  # whose square is infinite in fp32
    step.rollouts[0] = replace(first, base=pack(base))
    report = step.loop.learner.step(0, step.rollouts, step.cotangents, [1.0] * 4)
    assert not math.isfinite(report.grad_norm)
    assert {(f.what, f.sample) for f in report.faults} == {("gradient", first.item.samples[1])}


@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_a_heavy_penalty_keeps_the_model_near(tmp_path: Path, more: list[str]) -> None:
    """The distance starts at rounding, and over the steps grows far less than where it is only measured."""
    ends = {}
    for weight in (0.0, 1000.0):
        rate = "learners.optimizer.lr=1e-3" if more else "learners.optimizer.lr=1e-4"
        loop = LocalLoop(config(tmp_path, "steps=4", rate, f"learners.base_penalty.weight={weight}", *more))
        found = [sum(loop.step(step).base_distance) / 4 for step in range(4)]
        assert len(loop.step(4).base_distance) == 4
        assert found[0] < 1e-9 < found[1]
        ends[weight] = found[-1]
    assert ends[1000.0] < 0.5 * ends[0.0]


def test_a_weight_of_zero_measures_and_changes_nothing(tmp_path: Path) -> None:
    digests = []
    for more in ([], ["learners.base_penalty.weight=0"], ["learners.base_penalty.weight=1"]):
        loop = LocalLoop(config(tmp_path, *more))
        reports = [loop.step(step) for step in range(2)]
        assert [len(r.base_distance) for r in reports] == ([4] * 2 if more else [0] * 2)
        digests.append(loop.learner.digest())
    assert digests[0] == digests[1] != digests[2]


@pytest.fixture(scope="module")
def table() -> Embeddings:
    return encode(small_config(Path("runs")), TEXTS)


def test_adapters_off_is_the_frozen_copy_bit_for_bit(tmp_path: Path, table: Embeddings) -> None:
    """The same item's base velocities by either kind of sampler; asking for them leaves the sampler as it was."""
    full = LocalLoop(config(tmp_path, "learners.base_penalty.weight=1", f"backbone.guidance={G}"))
    lora = LocalLoop(config(tmp_path, "learners.base_penalty.weight=1", f"backbone.guidance={G}", *LORA))
    moved(full), moved(lora)
    published = [[PackedTensors.of(loop.learner.engine.weights())] for loop in (full, lora)]
    item = full.items(0)[0]
    found = []
    for loop, packed in zip((full, lora), published, strict=True):
        sha256 = digest(merge_tensors(packed))
        once, again = (loop.sampler.rollout(item, lambda p=packed: p) for _ in range(2))
        assert loop.sampler.digest() == sha256
        for one, two in zip((once[1].states, once[1].base, once[2]), (again[1].states, again[1].base, again[2]),
                            strict=True):  # fmt: skip
            assert one is not None and two is not None and torch.equal(unpack(one), unpack(two))
        x, node, row = unpack(once[1].states)[:2] if not found else found[0][1], torch.tensor([1, 4]), torch.arange(2)
        with torch.no_grad():
            found.append((loop.sampler._base_velocity(item, full.learner.sigmas)(x, node, row), x))
            now, _ = loop.sampler._velocity(item)
            assert float((now(x, node, row) - found[-1][0]).norm()) > 1e-2
    assert torch.equal(found[0][0], found[1][0])
    base = backbone_named("shapes").load_transformer(torch.float32)
    with torch.no_grad():
        want = G * full.sampler.backbone.predict(base, x, full.learner.sigmas[node], table.rows(item.prompt_ids))
    assert torch.allclose(found[0][0], want, rtol=0, atol=1e-5)


def test_a_base_velocity_that_is_not_finite_is_named_and_its_row_left_out(tmp_path: Path) -> None:
    loop = LocalLoop(config(tmp_path, "learners.base_penalty.weight=1"))
    item: Item = loop.items(0)[1]
    sigmas, nodes = loop.learner.sigmas, [node for node, _ in item.plans[1].states]

    def still(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def base(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        bad = (row == 1) & (node >= nodes[1])
        return torch.where(bad.view(-1, 1, 1, 1), torch.inf, x)

    report, rollout, _ = run_item(item, still, sigmas, noise_of(item, (8, 8, 8)), base=base)
    [fault] = report.faults
    assert (fault.what, fault.sample, fault.node) == ("base velocity", item.samples[1], nodes[1])
    assert report.kept == (True, False)
    assert rollout.base is not None and torch.isfinite(unpack(rollout.base)).all()
    good = len(item.plans[0].states)
    assert torch.equal(unpack(rollout.base)[:good], unpack(rollout.states)[:good])


def test_only_a_sampler_of_full_fine_tuning_holds_a_copy(tmp_path: Path) -> None:
    on = "learners.base_penalty.weight=1"
    held = [build_sampler(config(tmp_path, *more)).frozen for more in ([on], [on, *LORA], [])]
    assert held[0] is not None and held[1:] == [None, None]
    assert not any(p.requires_grad for p in held[0].parameters())
