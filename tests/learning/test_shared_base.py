"""One copy of a frozen base for sampler and learner: the weights of two copies, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flowbp_ray.backbones.frozen import shared_copy
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.planning import memory
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.learner_memory import learners
from flowbp_ray.utils.digest import digest
from flowbp_ray.weights import trainable
from tests.backbones.families import run_config
from tests.conftest import Saved
from tests.small import small_config

LORA = "learners.lora={rank: 4, alpha: 8}"
SHARED = "cluster.share_base=true"
MEASURED = ["learners.base_penalty={weight: 1.0}", "drift.meter=true", "learners.gradient_checkpointing=true"]


def tensors(module: nn.Module) -> dict[int, int]:
    """Address -> bytes of each parameter and buffer."""
    return {t.data_ptr(): t.nbytes for t in [*module.parameters(), *module.buffers()] if t.numel()}


def frozen(module: nn.Module) -> str:
    return digest({name: p for name, p in module.named_parameters() if not p.requires_grad})


def compared(config: RunConfig, shared: RunConfig) -> LocalLoop:
    """Train two steps with either; weights, drift and distances are the same bits. Returns the loop that shares."""
    apart, loop = LocalLoop(config), LocalLoop(shared)
    base = frozen(loop.sampler.transformer)
    for step in range(2):
        reports = [each.step(step) for each in (apart, loop)]
        for field in ("grad_norm", "drift", "base_distance", "forwards"):
            assert getattr(reports[0], field) == getattr(reports[1], field)
        assert [each.sampler.digest() for each in (apart, loop)] == [apart.sampler.digest()] * 2
    assert loop.learner.digest() == apart.learner.digest() != loop.sampler.digest()
    assert frozen(loop.sampler.transformer) == frozen(loop.learner.engine.module) == base
    return loop


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_of_two_copies(tmp_path: Path, dtype: str) -> None:
    config, shared = (
        small_config(tmp_path, "flowbp_bridge", LORA, f"backbone.dtype={dtype}", *MEASURED, *more)
        for more in ([], [SHARED])
    )
    loop = compared(config, shared)
    modules = (loop.sampler.transformer, loop.learner.engine.module)
    both = tensors(modules[0]) | tensors(modules[1])
    adapters = sum(p.nbytes for p in trainable.trained(modules[0]).values())
    assert sum(both.values()) == sum(tensors(modules[0]).values()) + adapters
    assert not modules[0].training and modules[1].training


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_shared_too(saved: Saved, tmp_path: Path, kind: str) -> None:
    own = [f"backbone.quantization={kind}", LORA, *MEASURED]
    folder = saved("flux1")[0]
    config, shared = (run_config("flux1", folder, tmp_path, "flowbp_bridge", *own, *more) for more in ([], [SHARED]))
    loop = compared(config, shared)
    sizes = memory.Sizes.of(shared, Costs(shared))
    [held] = [s for s in memory.samplers(shared, Costs(shared), sizes).shares if s.name == "adapters"]
    assert held.nbytes == sum(p.nbytes for p in trainable.trained(loop.sampler.transformer).values())
    assert learners(shared, Costs(shared), sizes) == learners(config, Costs(config), sizes)


def test_a_copy_has_modules_of_its_own_over_the_same_tensors() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    copied = shared_copy(base)
    assert tensors(copied) == tensors(base)
    copied[0] = nn.Identity()
    copied.eval()
    assert isinstance(base[0], nn.Linear) and base.training and base[1].training
    assert torch.equal(copied[1].weight, base[1].weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"all weights are trained; write learners\.lora"),
        ([LORA, "samplers.count=2"], r"is for one sampler; write samplers="),
        ([LORA, "samplers.max=2"], r"is for one sampler; write samplers="),
        ([LORA, "learners.engine=deepspeed", "learners.count=2"], r"is for one learner.*write learners\.count=1"),
        ([LORA, "learners.engine=deepspeed", "learners.zero=3"], r"write learners\.zero=2"),
        ([LORA, "samplers.gpus=1", "learners.gpus=1"], r"write cluster\.colocate=true, or samplers\.gpus=0\.5"),
        ([LORA, "learners.gpus=1"], r"write cluster\.colocate=true"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"cluster\.share_base=true .*{message}"):
        small_config(tmp_path, "flowbp_sparse", SHARED, *overrides)
    small_config(tmp_path, "flowbp_sparse", SHARED, LORA, "cluster.colocate=true")
