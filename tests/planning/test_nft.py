"""What is planned for terms without gradient, against what a step in one process computes and sends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Packed, Rollout, Scored
from flowbp_ray.planning import learner_memory, memory, reward_memory
from flowbp_ray.planning.advice import check_fit
from flowbp_ray.planning.cluster import Cluster
from flowbp_ray.planning.costs import Costs, largest
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.planning.traffic import between_learners, traffic
from flowbp_ray.planning.work import sampled, swept, work
from flowbp_ray.utils.units import GIB
from tests.planning.common import CLOSE, backward, config_of, peak_of, real_node
from tests.small import small_config
from tests.test_cli import call


class Brightness:
    """A reward without gradient whose scores always differ."""

    differentiable = False

    def __init__(self, device: str = "cpu") -> None:
        self.name, self.device = "brightness", device

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.detach().flatten(1).mean(dim=1)


OWN = f"{{name: own, kind: '{__name__}:Brightness'}}"  # of which nothing is traced
MINE = f"{{name: brightness, kind: '{__name__}:Brightness', gradient: none}}"
GROUPS = ["data.images_per_prompt=4", "data.prompts_per_step=2", "data.rollout_batch=4", "learners.micro_batch=4"]
PURE = ["method=null", f"rewards.terms=[{MINE}]", *GROUPS]
MIXED = [f"rewards.terms=[{{name: shapes_clip}}, {MINE}]", *GROUPS]
TWO = [f"rewards.terms=[{{name: shapes_clip}}, {{name: shapes_clip_heldout}}, {MINE}]", "rewards.balance=grad_norm"]
BASE = "learners.base_penalty.weight=1"
GUIDED = "backbone.guidance=3"
HELD = "learners.base_penalty={weight: 1, guidance: 3}"
FUSED = ["nft.times=3", "learners.fuse=2"]
CASES: dict[str, list[str]] = {
    "pure": PURE,
    "guided, with the base": [*PURE, GUIDED, BASE],
    "three times, fused": [*PURE, *FUSED],
    "mixed": [*MIXED, GUIDED],
    "mixed, with the base": [*MIXED, GUIDED, BASE],
    "mixed, with the base guided": [*MIXED, HELD],
    "mixed, with the base guided less": [*MIXED, "backbone.guidance=4", HELD],
    "pure, with the base guided": [*PURE, GUIDED, HELD],
    "mixed, negative branch": [*MIXED, GUIDED, "backbone.detach_negative=false", *FUSED],
    "balanced": [*MIXED, *TWO],
    "average": [*PURE, "nft.policy=average", "learners.ema={decay: 0.5, ramp: 0.1}"],
}


class Counted:
    """Calls and rows of some modules."""

    def __init__(self, *modules: nn.Module | None) -> None:
        self.calls: list[int] = []
        for module in modules:
            if module is not None:
                module.register_forward_hook(self)

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.calls.append(len(output[0] if isinstance(output, tuple) else getattr(output, "sample", output)))

    @property
    def counted(self) -> tuple[int, int]:
        return len(self.calls), sum(self.calls)


@pytest.mark.parametrize("case", CASES)
def test_forwards_and_bytes_are_those_of_a_real_step(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, "flowbp_sparse", *CASES[case])
    loop = LocalLoop(config)
    drawing, learning = Counted(loop.sampler.transformer, loop.sampler.frozen), Counted(loop.learner.engine.bare)
    sent: list[tuple[Rollout, Packed, Scored, Packed]] = []
    score = loop.scorer.score

    def recorded(item: Any, texts: Any, report: Any, target: Packed) -> tuple[Scored, Packed]:
        scored, cotangent = score(item, texts, report, target)
        sent.append((rollouts.pop(), target, scored, cotangent))
        return scored, cotangent

    rollouts: list[Rollout] = []
    draw = loop.sampler.rollout

    def drawn(*arguments: Any) -> Any:
        report, rollout, target = draw(*arguments)
        rollouts.append(rollout)
        return report, rollout, target

    monkeypatch.setattr(loop.scorer, "score", recorded)
    monkeypatch.setattr(loop.sampler, "rollout", drawn)
    found = loop.step(0)

    costs = Costs(config)
    assert sampled(config, costs.backbone) == drawing.counted
    apart = 1 if "negative branch" not in case or costs.backbone.joint_branches else 2
    assert (found.forwards, found.rows) == swept(config) and len(learning.calls) == found.forwards * apart
    done = work(config, costs)
    assert [(w.calls, w.rows) for w in done[:2]] == [drawing.counted, swept(config)]
    moved, rows = traffic(config, costs, memory.Sizes.of(config, costs), 0), config.data.shape.batch

    def each(*parts: Packed | None) -> float:
        return sum(part.nbytes for part in parts if part is not None) / rows

    assert moved.states == each(*(r.states for r, *_ in sent))
    assert moved.forward == each(*(part for r, *_ in sent for part in (r.finished, r.old)))
    assert moved.base == each(*(r.base for r, *_ in sent)) and bool(moved.base) == ("base" in case)
    assert moved.targets == each(*(target for _, target, *_ in sent))
    assert moved.cotangents == each(*(cotangent for *_, cotangent in sent)) and bool(moved.cotangents) != (
        config.method is None
    )
    assert moved.per_image == moved.states + moved.forward + moved.base + moved.targets + moved.cotangents


def test_learners_exchange_once_for_each_call_with_zero_2() -> None:
    """By hand: 32 images on 4 ranks, 2 times each, in calls of 4 rows are 4 calls of a rank."""
    overrides = [*PURE, "data.prompts_per_step=8", "learners.engine=deepspeed", "learners.count=4", "learners.zero=2"]
    config, sizes = loading.load("shapes_flowbp_sparse", overrides), memory.Sizes(10**6, 10**6, 0, {}, 0)
    assert swept(config) == (16, 64)
    assert between_learners(config, sizes) == (4 + 1) * 10**6 * 4 * 3 // 4


@pytest.mark.parametrize("method", ["null", "{name: flowbp_sparse, k: 2}"])
def test_a_learner_holds_one_branch_where_there_is_no_surrogate(method: str, folders: Any) -> None:
    """Against PyTorch's profiler on a real forward without guidance; the surrogate's has the negative branch too."""
    whole, bare = folders("sd35")
    terms = f"rewards.terms=[{MINE}]" if method == "null" else f"rewards.terms=[{OWN}, {MINE}]"
    given = [f"method={method}", terms, "data.images_per_prompt=2", "data.prompts_per_step=8"]
    config = config_of("sd35", bare, *given, "backbone.detach_negative=false", "learners.gradient_checkpointing=false")
    costs = Costs(config)
    sizes = memory.Sizes.of(config, costs)
    shares = {share.name: share.nbytes for share in learner_memory.learners(config, costs, sizes).shares}
    alone = costs.forward_node(config)
    assert costs.node(config).peak > 1.5 * alone.peak and costs.node(config).flops > 1.9 * alone.flops
    assert shares["activations of one node"] == (alone.peak if method == "null" else costs.node(config).peak)
    calls, rows = swept(config)
    assert rows == 16 * 2 + (0 if method == "null" else 16 * 2) and calls >= rows // largest(config)
    flops = alone.flops * 16 + (0 if method == "null" else costs.node(config).flops * 16)
    assert work(config, costs)[1].flops == flops
    unguided = config.model_copy(update={"backbone": config.backbone.model_copy(update={"guidance": 1.0})})
    forward, _ = real_node(unguided, backbone_named("sd35", str(whole)).load_transformer(torch.float32))
    backward(forward)
    assert alone.peak == pytest.approx(peak_of(lambda: backward(forward)), rel=2 * CLOSE)


def test_a_reward_server_keeps_no_graph_where_nothing_is_backpropagated(tmp_path: Path) -> None:
    pure, mixed = (small_config(tmp_path, "flowbp_sparse", *case) for case in (PURE, MIXED))
    costs = Costs(pure)
    roles = [reward_memory.rewards(c, costs, memory.Sizes.of(c, costs)) for c in (pure, mixed)]
    scoring = [sum(s.nbytes for s in role.shares if s.phase == "scoring") for role in roles]
    assert scoring[0] == costs.decoding(4, False).peak < scoring[1] / 2
    assert work(pure, costs)[2].what == "decoding, 4 images" and work(pure, costs)[2].forwards == 8
    assert work(mixed, costs)[2].what == "decoding + backward, 4 images" and work(mixed, costs)[2].forwards > 8
    latents = torch.randn(4, *costs.latent_shape)
    decode = LocalLoop(pure).sampler.backbone.load_decoder("cpu")
    with torch.no_grad():
        decode(latents)
        assert scoring[0] == pytest.approx(peak_of(lambda: decode(latents)), rel=2 * CLOSE)
    judged = ["rewards.terms=[{name: look, kind: judge, gradient: none}]"]
    judge = "judges=[{name: look, url: 'http://127.0.0.1:9', template: {kind: yes_no}, role: reward}]"
    only = small_config(tmp_path, "flowbp_sparse", *PURE, *judged, judge)
    names = [share.name for share in reward_memory.rewards(only, costs, memory.Sizes.of(only, costs)).shares]
    assert names == ["decoder weights (VAE)", "decoder activations"] and not reward_memory.unstated(only, costs)


def sd35(folder: Path, *overrides: str) -> RunConfig:
    given = ["method=null", f"rewards.terms=[{MINE}]", "data.images_per_prompt=2", "data.prompts_per_step=8"]
    return config_of("sd35", folder, *given, *overrides)


def test_a_cluster_that_is_too_small_gets_an_answer(folders: Any) -> None:
    """The change that it names is one that the configuration takes."""
    config = sd35(folders("sd35")[1])
    costs = Costs(config)
    verdict = check_fit(config, Cluster((80 * GIB,) * 4, None), costs)
    assert not verdict.fits and verdict.changes and "nothing that plan tries" not in verdict.line
    assert check_fit(config, Cluster((80 * GIB,) * 24, None), costs).fits
    assert json.loads(json.dumps(forecast(config, costs).to_dict()))["traffic"]["cotangents"] == 0


RUNS: dict[str, list[str]] = {
    "shapes": ["shapes_flowbp_sparse", *PURE, "learners.engine=torch", "learners.count=1"],
    "sd35": ["sd35_flowbp_sparse", "method=null", f"rewards.terms=[{MINE}]", "data.images_per_prompt=2"],
    "sd35, mixed": ["sd35_flowbp_sparse", f"rewards.terms=[{OWN}, {MINE}]", "data.images_per_prompt=2"],
}


@pytest.mark.parametrize("run", RUNS)
def test_the_command(run: str, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name, *overrides = RUNS[run]
    if name.startswith("sd35"):
        small = ["backbone.height=64", "backbone.width=64", "data.prompts_per_step=24", "learners.micro_batch=2"]
        overrides += [*small, f"backbone.path={folders('sd35')[1]}", "evaluation.prompts=null"]
    assert call("plan", name, *overrides, "--gpus", "4x80GB") == int(name.startswith("sd35"))
    printed, line = capsys.readouterr()
    assert "without gradient, by DiffusionNFT: brightness; per sample at most 2 VJPs" in printed
    assert "forward process" in printed and ("cotangents 0 B" in printed) == ("mixed" not in run)
    assert "write samplers.count=" in line or "no role asks for one" in printed
