"""Which weights are trained, and that samplers take them."""

from __future__ import annotations

import pytest
import torch

from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config.learners import LoraConfig
from flowbp_ray.utils.digest import digest
from flowbp_ray.weights import trainable


def test_lora_publishes_adapters_only_and_a_sampler_takes_them() -> None:
    lora = LoraConfig(rank=2, alpha=4)
    learner, sampler = (backbone_named("shapes").load_transformer(torch.float32) for _ in range(2))
    trainable.prepare(learner, lora, seed=1)
    trainable.prepare(sampler, lora, seed=2)
    names = set(trainable.trained(learner))
    assert names and all("lora_" in name for name in names)
    with torch.no_grad():
        for parameter in trainable.trained(learner).values():
            parameter.normal_()
    assert digest(trainable.trained(learner)) != digest(trainable.trained(sampler))
    trainable.install(sampler, {k: v.detach() for k, v in trainable.trained(learner).items()})
    assert digest(dict(learner.state_dict())) == digest(dict(sampler.state_dict()))
    with pytest.raises(ValueError, match="do not fit"):
        trainable.install(sampler, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="match no module"):
        trainable.prepare(backbone_named("shapes").load_transformer(torch.float32), LoraConfig(targets=["nope"]), 0)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8), LoraConfig(rank=2, targets=["ff.net.2"])])
def test_what_is_trained_is_told_from_the_skeleton_as_from_the_weights(lora: LoraConfig | None) -> None:
    backbone = backbone_named("shapes")
    real = trainable.prepare(backbone.load_transformer(torch.float32), lora, 1, backbone.lora_targets)
    told = trainable.describe(trainable.prepare(backbone.skeleton(), lora, 1, backbone.lora_targets), lora)
    assert told == trainable.describe(real, lora)
    assert f"{sum(p.numel() for p in trainable.trained(real).values()):,} parameters" in told
    if lora is not None:
        modules = {name.rsplit(".lora_", 1)[0] for name in trainable.trained(real)}
        assert f"on {len(modules)} modules" in told and all(t in told for t in lora.targets or backbone.lora_targets)
