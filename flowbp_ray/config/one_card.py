"""What a run on few GPUs cannot do: a quantised base without adapters, a base of several processes, uneven pairs."""

from __future__ import annotations

import math
from typing import Any

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.config.sections import BackboneConfig, ClusterConfig
from flowbp_ray.utils.settings import ElasticPoolConfig

BESIDE = 0.2
"""The largest `rewards.gpus` with which reward servers have their room on the GPUs of pairs."""


def check_one_card(
    model: BackboneConfig, learners: LearnersConfig, samplers: ElasticPoolConfig, cluster: ClusterConfig, staleness: int
) -> None:
    """Raises ValueError where `backbone.quantization`, `cluster.share_base` or `cluster.colocate=pairs` cannot be."""
    if cluster.colocate == "pairs":
        _check_pairs("cluster.colocate=pairs", learners, samplers, staleness)
    if model.quantization:
        _check_quantised(f"backbone.quantization={model.quantization}", learners)
    if cluster.share_base:
        _check_shared("cluster.share_base=true", learners, samplers)


def share_a_gpu(plain: Any) -> Any:
    """The plain tree; with cluster.colocate `gpus` of samplers, rewards and learners are parts of one GPU.

    They are equal here, where the model is not known; `flowbp_ray.planning.colocation` replaces them by what is needed.
    """
    if (
        not isinstance(plain, dict)
        or not isinstance(plain.get("cluster"), dict)
        or not plain["cluster"].get("colocate")
    ):
        return plain
    if plain["cluster"]["colocate"] == "pairs":
        return in_pairs(plain)
    roles = {role: plain.get(role) or {} for role in ("samplers", "rewards", "learners")}
    try:
        here = {role: keys for role, keys in roles.items() if not keys.get("url")}
        processes = sum(keys.get("max") or keys.get("count", 1) for keys in here.values())
        part = max(0.001, math.floor(1000 / processes) / 1000)  # Ray counts in ten-thousandths
    except (AttributeError, TypeError, ZeroDivisionError):  # which validation will name
        return plain
    return plain | {role: {**keys, "gpus": part} for role, keys in here.items()}


def in_pairs(plain: dict[str, Any]) -> dict[str, Any]:
    """The plain tree with one GPU for each learner and sampler together, and for a reward server that asks for little.

    No two learners fit on one, and no two samplers beside a learner. `flowbp_ray.planning.sharing` replaces the parts
    by what is needed.
    """
    samplers, learners, rewards = (plain.get(role) or {} for role in ("samplers", "learners", "rewards"))
    try:
        left = beside_pairs(float(rewards.get("gpus") or 0))
        parts = {"samplers": {**samplers, "gpus": round(0.45 - left, 3)}, "learners": {**learners, "gpus": 0.55}}
    except (AttributeError, TypeError, ValueError):  # which validation will name
        return plain
    return plain | parts


def beside_pairs(gpus: float) -> float:
    """The part of a pair's GPU that is left for a reward server: what it asks for, if that is at most BESIDE."""
    return gpus if 0 < gpus <= BESIDE else 0.0


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


def _check_pairs(key: str, learners: LearnersConfig, samplers: ElasticPoolConfig, staleness: int) -> None:
    count = learners.count
    if staleness:
        raise ValueError(
            f"{key} lets roles take turns, and with staleness={staleness} they overlap; write staleness=0, or "
            "cluster.colocate=false"
        )
    if samplers.bounds != (count, count):
        least, most = samplers.bounds
        got = f"samplers.count={samplers.count}" + f" (from {least} to {most})" * (least != most)
        raise ValueError(
            f"{key} puts one sampler beside each learner, got {got} and learners.count={count}; write "
            f"samplers={{count: {count}, min: null, max: null}}"
        )
