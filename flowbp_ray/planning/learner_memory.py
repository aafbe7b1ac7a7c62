"""The memory of a learner: the state of its engine by the engine's own rules, and one node's activations."""

from __future__ import annotations

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.base import base_bytes
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.memory import FP32, Place, Role, Share, Sizes, prompt_bytes, role
from flowbp_ray.weights import buckets

BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer in which gradients are reduced (reduce_bucket_size), whatever the model's size."""
LIVE = 1_000_000_000
"""Elements that DeepSpeed gathers at most at a time at stage 3 (max_live_parameters), and the optimizer's share."""


def learners(config: RunConfig, costs: Costs, sizes: Sizes) -> Role:
    """The engine's state, one node's activations, and what the optimizer and publishing need for a short time."""
    surrogate, forward = config.rewards.differentiable, config.rewards.scored
    peaks = [*([costs.node(config).peak] if surrogate else []), *([costs.forward_node(config).peak] if forward else [])]
    node = Share("activations of one node", max(peaks), "backward")
    rows = config.data.shape.batch // config.learners.count
    prompts = Share("embeddings of the batch", rows * prompt_bytes(costs), "backward")
    engine = torch_shares(config, sizes) if config.learners.engine == "torch" else deepspeed_shares(config, sizes)
    if config.broadcasts:
        kept = (config.staleness + 1 if config.staleness else 0) * sizes.trained * config.backbone.torch_dtype.itemsize
        staged = bucket_bytes(config, sizes) * (config.learners.engine == "deepspeed" and config.learners.zero > 0)
        engine += [Share("copies of versions", kept, place="host"), Share("a bucket to send", staged, "publishing")]
    return role("learners", config.learners, [*engine, node, prompts])


def bucket_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of the largest bucket in which weights are published (`flowbp_ray.weights.buckets`)."""
    item = config.backbone.torch_dtype.itemsize
    return max(min(buckets.BUCKET, -(-sizes.trained // config.learners.count) * item), sizes.largest * item)


def moment_bytes(config: RunConfig, count: int) -> int:
    """Bytes of AdamW's two moments of `count` parameters: in int8 one each, and an fp32 scale for every 256."""
    if config.learners.optimizer.moments == "fp32":
        return 2 * count * FP32
    return 2 * (count + count // 256 * FP32)


def state_bytes(config: RunConfig, trained: int) -> int:
    """Bytes of the engine's state, of all ranks together: masters, moments and average of so many parameters."""
    return trained * FP32 * (1 + (config.learners.ema is not None)) + moment_bytes(config, trained)


def checkpoint_bytes(config: RunConfig, trained: int) -> int:
    """Bytes of a checkpoint but for its evaluations: the state, and the published weights with their average.

    In a stale run there are as many older versions as steps of staleness.
    """
    versions = 1 + (config.learners.ema is not None) + config.staleness
    return state_bytes(config, trained) + versions * trained * config.backbone.torch_dtype.itemsize


def torch_shares(config: RunConfig, sizes: Sizes) -> list[Share]:
    """What `TorchEngine` holds on its one rank.

    There are gradients from the first backward to the end of a step; those of bf16 weights become fp32 ones tensor by
    tensor. On a GPU AdamW is fused and needs nothing of its own; on CPUs it goes through the tensors one by one, and
    needs two of the largest (the denominator and its quotient).
    """
    item, t = config.backbone.torch_dtype.itemsize, sizes.trained
    half = item < FP32
    return [
        Share("weights", base_bytes(config.backbone, sizes.transformer, sizes.linears)),
        Share("optimizer: fp32 masters", t * FP32 * half),
        Share("optimizer: moments", moment_bytes(config, t)),
        Share("average", t * FP32 * (config.learners.ema is not None)),
        Share("gradients", t * item, "backward"),
        Share("fp32 gradients", t * FP32, "optimizer"),
        Share("gradient that is cast", sizes.largest * item * half, "optimizer"),
        Share("AdamW's temporaries", 0 if config.learners.gpus else 2 * sizes.largest * FP32, "optimizer"),
        Share("average, a bucket cast", bucket_bytes(config, sizes) * (config.learners.ema is not None), "publishing"),
    ]


def deepspeed_shares(config: RunConfig, sizes: Sizes) -> list[Share]:
    """What `DeepSpeedEngine` holds on each of `count` ranks at ZeRO stage 0 to 3 (DeepSpeed's defaults, bf16 or fp32).

    Stage 0 trains the weights themselves. From stage 1 masters and moments are sharded, from 2 the gradients, at 3 the
    weights too; DeepSpeed keeps fp32 masters also of fp32 weights. Stage 3 takes the whole weights to the device and
    shards them tensor by tensor; only then it makes masters, moments and gradients (zero/stage3.py, `__init__`). A
    bucket that it gathers is held twice: as it arrives, and put together.
    """
    learners, item = config.learners, config.backbone.torch_dtype.itemsize
    stage, t, ema = learners.zero, sizes.trained, learners.ema is not None
    own = -(-t // learners.count) if stage else t
    place: Place = "host" if learners.offload else "device"
    updated = min(own, LIVE) if stage == 3 else own
    fixed = sizes.transformer if stage < 3 else -(-sizes.transformer // learners.count)
    shares = [
        Share("weights", base_bytes(config.backbone, fixed, sizes.linears)),  # quantised ones are never sharded
        Share("optimizer: fp32 masters", own * FP32 * (stage > 0), place=place, built=True),
        Share("optimizer: moments", 2 * own * FP32, place=place, built=True),
        Share("average", own * FP32 * ema, place=place, built=True),
        Share("gradients", (t if stage < 2 else own) * item, built=True),
        Share("AdamW's temporaries", updated * FP32 * (not learners.gpus), "optimizer", place),
        Share("average, a bucket cast", bucket_bytes(config, sizes) * (ema and stage > 0), "publishing"),
    ]
    if stage == 0:
        return [*shares, Share("gradients on their way", min(BUCKET, t) * item, "backward")]
    buffers = 2 if learners.interconnect == "pcie" else 1
    bucket = Share("gradients on their way", buffers * BUCKET * item, "backward" if stage < 3 else "", built=True)
    shares += [bucket, Share("fp32 gradients", updated * FP32, "optimizer", place)]
    if stage < 3:
        return [*shares, Share("gradients of this node", own * item, "backward")]
    return [
        *shares,
        Share("whole weights, before they are sharded", (sizes.transformer - fixed) * item, "building"),
        Share("gathered weights", min(sizes.transformer, LIVE) * item, "backward"),
        Share("weights, a bucket gathered", 2 * bucket_bytes(config, sizes), "publishing"),
    ]
