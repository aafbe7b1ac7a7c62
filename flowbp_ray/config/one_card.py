"""What a run in little memory cannot do: a quantised base without adapters, a base shared by several processes."""

from __future__ import annotations

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.config.sections import BackboneConfig, ClusterConfig
from flowbp_ray.utils.settings import ElasticPoolConfig


def check_one_card(
    model: BackboneConfig, learners: LearnersConfig, samplers: ElasticPoolConfig, cluster: ClusterConfig
) -> None:
    """Raises ValueError where `backbone.quantization` or `cluster.share_base` cannot be."""
    if model.quantization:
        _check_quantised(f"backbone.quantization={model.quantization}", learners)
    if cluster.share_base:
        _check_shared("cluster.share_base=true", learners, samplers)


def _check_quantised(key: str, learners: LearnersConfig) -> None:
    if learners.lora is None:
        raise ValueError(
            f"{key} freezes the base, so only adapters can be trained; write learners.lora={{rank: 16}}, or "
            "backbone.quantization=null"
        )
    if learners.engine == "deepspeed" and learners.zero == 3:
        raise ValueError(f"{key} cannot be sharded by learners.zero=3; write learners.zero=2")


def _check_shared(key: str, learners: LearnersConfig, samplers: ElasticPoolConfig) -> None:
    off = "or cluster.share_base=false"
    if learners.lora is None:
        raise ValueError(
            f"{key} shares a frozen base, and all weights are trained; write learners.lora={{rank: 16}}, {off}"
        )
    if samplers.bounds != (1, 1):
        raise ValueError(f"{key} is for one sampler; write samplers={{count: 1, min: null, max: null}}, {off}")
    if learners.count != 1:
        raise ValueError(
            f"{key} is for one learner, got learners.count={learners.count}; write learners.count=1, {off}"
        )
    if learners.engine == "deepspeed" and learners.zero == 3:
        raise ValueError(f"{key} needs the whole base, which learners.zero=3 shards; write learners.zero=2, {off}")
    if bool(samplers.gpus) != bool(learners.gpus) or samplers.gpus + learners.gpus > 1:
        raise ValueError(
            f"{key} puts samplers.gpus={samplers.gpus:g} and learners.gpus={learners.gpus:g} on one GPU; write "
            "cluster.colocate=true, or samplers.gpus=0.5 and learners.gpus=0.5"
        )
