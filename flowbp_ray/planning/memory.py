"""The memory of each process: bytes by name, from the configuration, the engine's rules and traces.

A process goes through phases (a learner: building, backward, optimizer, publishing). Some of what it holds is there in
all of them, the rest in one phase only. The phase that holds most decides whether it fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from flowbp_ray.backbones.guidance import one_branch
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.utils.settings import PoolConfig
from flowbp_ray.weights import buckets
from flowbp_ray.weights.trainable import trained

FP32 = 4
WORKSPACE = 3 * 2**29
"""Bytes of a CUDA context with the workspaces of cuBLAS, cuDNN and NCCL: 1.5 GiB."""
FRAGMENTATION = 0.05
"""Share of what is held that the caching allocator loses."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer in which gradients are reduced (reduce_bucket_size), whatever the model's size."""
LIVE = 1_000_000_000
"""Elements that DeepSpeed gathers at most at a time at stage 3 (max_live_parameters), and the optimizer's share."""

MEMORY_PHASES = ("", "building", "rollout", "backward", "optimizer", "publishing", "scoring", "evaluation")
"""The phases in the order in which they are shown; "" is what is held in all of them."""

Place = Literal["device", "host"]


@dataclass(frozen=True)
class Share:
    """Bytes that a process holds for one purpose."""

    name: str
    nbytes: int
    phase: str = ""
    """The phase in which they are held; "": in all phases."""
    place: Place = "device"
    """Where they are held; those of an offloaded optimizer are on the "host"."""


@dataclass(frozen=True)
class Role:
    """A pool of identical processes, and what each of them holds."""

    name: str
    count: int
    """Number of processes."""
    gpus: float
    """GPUs that each process asks of Ray; 0 runs on CPUs."""
    shares: tuple[Share, ...]

    def held(self, phase: str, place: Place = "device") -> int:
        """Bytes in one phase, without overhead."""
        return sum(s.nbytes for s in self.shares if s.place == place and s.phase in ("", phase))

    @property
    def fullest(self) -> str:
        """The phase in which most is held."""
        return max((s.phase for s in self.shares), key=self.held, default="")

    @property
    def overhead(self) -> int:
        """Bytes of workspace and fragmentation on a GPU; 0 on CPUs."""
        return WORKSPACE + int(FRAGMENTATION * self.held(self.fullest)) if self.gpus else 0

    @property
    def nbytes(self) -> int:
        """Bytes that one process needs at most, overhead included: on its GPU, or in host memory without one."""
        return self.held(self.fullest) + self.overhead


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of the model's parts."""

    transformer: int
    trained: int
    """Parameters of the transformer that are trained, adapters included."""
    vae: int
    encoders: dict[str, int]
    """Text encoder -> parameters."""
    encoder_bytes: int
    """Bytes of all text encoders, as they are stored."""
    largest: int = 0
    """Elements of the largest trained tensor."""

    @staticmethod
    def of(config: RunConfig, costs: Costs) -> Sizes:
        """Counted on the meta device, once for the same adapters."""
        return costs.once(("sizes", str(config.learners.lora)), lambda: Sizes._count(config, costs))

    @staticmethod
    def _count(config: RunConfig, costs: Costs) -> Sizes:
        module, encoders = costs.transformer(config), costs.backbone.encoder_skeletons()
        return Sizes(
            transformer=elements(module),
            trained=sum(p.numel() for p in trained(module).values()),
            vae=elements(costs.backbone.vae_skeleton()),
            encoders={name: elements(encoder) for name, encoder in encoders.items()},
            encoder_bytes=sum(p.nbytes for encoder in encoders.values() for p in encoder.parameters()),
            largest=max((p.numel() for p in trained(module).values()), default=0),
        )


def elements(module: nn.Module) -> int:
    """Number of parameters of a module; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


def role(name: str, pool: PoolConfig, shares: list[Share]) -> Role:
    """The pool's role, with its shares phase by phase; those of no bytes are left out."""
    held = sorted((share for share in shares if share.nbytes), key=lambda share: MEMORY_PHASES.index(share.phase))
    return Role(name, pool.count, pool.gpus, tuple(held))


def samplers(config: RunConfig, costs: Costs, sizes: Sizes) -> Role:
    """The transformer, one forward without gradient, and the rollout's states and velocities."""
    model, rows = config.backbone, config.data.rollout_batch
    item = model.torch_dtype.itemsize
    latent = latent_bytes(costs, item)
    kept = 2 * model.num_steps + 1 + 2 * config.surrogate().renoised
    shares = [Share("weights", sizes.transformer * item)]
    if config.broadcasts:
        shares.append(Share("versions received ahead", config.staleness * sizes.trained * item))
    if config.learners.base_penalty is not None:
        budget = config.surrogate().max_terms(model.num_steps)
        kept += budget.terms + budget.junction
        if config.learners.lora is None:
            shares.append(Share("frozen base", sizes.transformer * item))
    if config.drift.on and not one_branch(costs.backbone, model.guidance):
        kept += model.num_steps + config.surrogate().renoised
    shares += [
        Share("activations, no gradient", costs.rollout(config, rows, model.guidance).peak, "rollout"),
        Share("states and velocities", rows * kept * latent, "rollout"),
    ]
    if config.evaluation.prompts:
        rows, kept = evaluated_at_once(config), 2 * (config.evaluation.num_steps or model.num_steps) + 1
        guidance = max([*config.evaluation.guidance, *config.evaluation.guidance_ends])
        shares.append(Share("activations, no gradient", costs.rollout(config, rows, guidance).peak, "evaluation"))
        shares.append(Share("states and velocities", rows * kept * latent, "evaluation"))
    return role("samplers", config.samplers, shares)


def rewards(config: RunConfig, costs: Costs, sizes: Sizes) -> Role:
    """The VAE in fp32 and one decoding with its backward; the rewards' own models are not counted.

    With `rewards.url` all of this is on another cluster, and nothing is held here.
    """
    if config.rewards.url:
        return role("reward servers", config.rewards, [])
    rows = decoded_at_once(config)
    shares = [
        Share("decoder weights (VAE)", sizes.vae * FP32),
        Share("decoder activations", costs.decoding(rows, True).peak, "scoring"),
    ]
    if config.evaluation.prompts:
        peak = costs.decoding(evaluated_at_once(config), False).peak
        shares.append(Share("decoder activations", peak, "evaluation"))
    return role("reward servers", config.rewards, shares)


def judges(config: RunConfig) -> tuple[Role, ...]:
    """The judges that the run serves itself: the files of their weights, divided by the GPUs of each.

    vLLM fits its caches into what is left, so they are not counted.
    """
    found = []
    for judge in config.judges:
        if judge.model is not None:
            files = [file for end in ("safetensors", "bin") for file in Path(judge.model).glob(f"*.{end}")]
            nbytes = sum(file.stat().st_size for file in files) // max(1, int(judge.gpus))
            found.append(Role(f"judge {judge.name}", 1, judge.gpus, (Share("files of its weights", nbytes),)))
    return tuple(found)


def decoded_at_once(config: RunConfig) -> int:
    """Rows of one decoding in training."""
    rows = config.data.rollout_batch * config.surrogate().branches
    return min(rows, config.rewards.micro_batch or rows)


def evaluated_at_once(config: RunConfig) -> int:
    """Rows of one item of an evaluation."""
    return min(config.evaluation.batch, config.evaluation.limit or config.evaluation.batch)


def latent_bytes(costs: Costs, itemsize: int) -> int:
    """Bytes of one latent."""
    size = itemsize
    for side in costs.latent_shape:
        size *= side
    return size


def learners(config: RunConfig, costs: Costs, sizes: Sizes) -> Role:
    """The engine's state, one node's activations, and what the optimizer and publishing need for a short time."""
    node = Share("activations of one node", costs.node(config).peak, "backward")
    rows = config.data.shape.batch // config.learners.count
    prompts = Share("embeddings of the batch", rows * prompt_bytes(costs), "backward")
    engine = torch_shares(config, sizes) if config.learners.engine == "torch" else deepspeed_shares(config, sizes)
    if config.broadcasts:
        kept = (config.staleness + 1 if config.staleness else 0) * sizes.trained * config.backbone.torch_dtype.itemsize
        staged = bucket_bytes(config, sizes) * (config.learners.engine == "deepspeed" and config.learners.zero > 0)
        engine += [Share("copies of versions", kept, place="host"), Share("a bucket to send", staged, "publishing")]
    return role("learners", config.learners, [*engine, node, prompts])


def prompt_bytes(costs: Costs) -> int:
    """Bytes of one encoded prompt, the longest."""
    return sum(tensor.nbytes for tensor in costs.backbone.conditioning_skeleton().values())


def bucket_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of the largest bucket in which weights are published (`flowbp_ray.weights.buckets`)."""
    item = config.backbone.torch_dtype.itemsize
    return max(min(buckets.BUCKET, -(-sizes.trained // config.learners.count) * item), sizes.largest * item)


def torch_shares(config: RunConfig, sizes: Sizes) -> list[Share]:
    """What `TorchEngine` holds on its one rank; AdamW over a list of tensors makes one more of each (denominators)."""
    item, t = config.backbone.torch_dtype.itemsize, sizes.trained
    half = item < FP32
    return [
        Share("weights", sizes.transformer * item),
        Share("optimizer: fp32 masters", t * FP32 * half),
        Share("optimizer: moments", 2 * t * FP32),
        Share("average", t * FP32 * (config.learners.ema is not None)),
        Share("gradients", t * item),
        Share("fp32 gradients", t * FP32 * half, "optimizer"),
        Share("AdamW's temporaries", t * FP32, "optimizer"),
        Share("average, a bucket cast", bucket_bytes(config, sizes) * (config.learners.ema is not None), "publishing"),
    ]


def deepspeed_shares(config: RunConfig, sizes: Sizes) -> list[Share]:
    """What `DeepSpeedEngine` holds on each of `count` ranks at ZeRO stage 0 to 3 (DeepSpeed's defaults, bf16 or fp32).

    Stage 0 trains the weights themselves. From stage 1 masters and moments are sharded, from 2 the gradients, at 3 the
    weights too; DeepSpeed keeps fp32 masters also of fp32 weights. A bucket that stage 3 gathers is held twice: as it
    arrives, and put together.
    """
    learners, item = config.learners, config.backbone.torch_dtype.itemsize
    stage, t, ema = learners.zero, sizes.trained, learners.ema is not None
    own = -(-t // learners.count) if stage else t
    place: Place = "host" if learners.offload else "device"
    fixed = sizes.transformer if stage < 3 else -(-sizes.transformer // learners.count)
    shares = [
        Share("weights", fixed * item),
        Share("optimizer: fp32 masters", own * FP32 * (stage > 0), place=place),
        Share("optimizer: moments", 2 * own * FP32, place=place),
        Share("average", own * FP32 * ema, place=place),
        Share("gradients", (t if stage < 2 else own) * item),
        Share("AdamW's temporaries", min(own, LIVE if stage == 3 else own) * FP32, "optimizer", place),
        Share("average, a bucket cast", bucket_bytes(config, sizes) * (ema and stage > 0), "publishing"),
    ]
    if stage == 0:
        return [*shares, Share("gradients on their way", min(BUCKET, t) * item, "backward")]
    bucket = Share("gradients on their way", BUCKET * item, "backward" if stage < 3 else "")
    shares += [bucket, Share("fp32 gradients", min(own, LIVE if stage == 3 else own) * FP32, "optimizer", place)]
    if stage < 3:
        return [*shares, Share("gradients of this node", own * item, "backward")]
    return [
        *shares,
        Share("whole weights, before they are sharded", sizes.transformer * item, "building"),
        Share("gathered weights", min(sizes.transformer, LIVE) * item, "backward"),
        Share("weights, a bucket gathered", 2 * bucket_bytes(config, sizes), "publishing"),
    ]
