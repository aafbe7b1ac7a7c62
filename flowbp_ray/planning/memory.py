"""The memory of each process: bytes by name, from the configuration, the engine's rules and traces.

A process goes through phases (a learner: building, backward, optimizer, publishing). Some of what it holds is there in
all of them, the rest in one phase only. The phase that holds most decides whether it fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from flowbp_ray.backbones.guidance import held_guidance, one_branch
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.base import Linears, base_bytes, linears_of
from flowbp_ray.planning.costs import Costs, noised_times
from flowbp_ray.utils.settings import PoolConfig
from flowbp_ray.weights.trainable import trained

FP32 = 4
WORKSPACE = 3 * 2**29
"""Bytes of a CUDA context with the workspaces of cuBLAS, cuDNN and NCCL: 1.5 GiB."""
FRAGMENTATION = 0.05
"""Share of what is held that the caching allocator loses."""

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
    built: bool = False
    """Whether they are made when building is over, and do not add to what building needs."""


@dataclass(frozen=True)
class Role:
    """A pool of identical processes, and what each of them holds."""

    name: str
    count: int
    """Number of processes."""
    gpus: float
    """GPUs that each process asks of Ray; 0 runs on CPUs."""
    shares: tuple[Share, ...]
    process: bool = True
    """Whether its processes are its own. False: it is in the learner's process, whose CUDA context counts there."""

    def held(self, phase: str, place: Place = "device") -> int:
        """Bytes in one phase, without overhead."""
        there = (s for s in self.shares if s.place == place and s.phase in ("", phase))
        return sum(s.nbytes for s in there if not (s.built and phase == "building"))

    @property
    def fullest(self) -> str:
        """The phase in which most is held."""
        return max((s.phase for s in self.shares), key=self.held, default="")

    @property
    def overhead(self) -> int:
        """Bytes of workspace and fragmentation on a GPU at its fullest; 0 on CPUs."""
        return self.needs(self.fullest) - self.held(self.fullest)

    @property
    def nbytes(self) -> int:
        """Bytes that one process needs at most, overhead included: on its GPU, or in host memory without one."""
        return self.needs(self.fullest)

    def needs(self, phase: str) -> int:
        """Bytes in one phase, overhead included; in a phase that is not its own it is at rest."""
        held = self.held(phase)
        return held + (WORKSPACE * self.process + int(FRAGMENTATION * held) if self.gpus else 0)


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
    linears: Linears | None = None
    """The weights that quantisation replaces; None where it is off."""

    @staticmethod
    def of(config: RunConfig, costs: Costs) -> Sizes:
        """Counted on the meta device, once for the same adapters."""
        found = costs.once(("sizes", str(config.learners.lora)), lambda: Sizes._count(config, costs))
        return replace(found, linears=linears_of(costs)) if config.backbone.quantization else found

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
    model, rows = config.backbone, config.data.sampled_at_once
    item = model.torch_dtype.itemsize
    latent = latent_bytes(costs, item)
    kept = 2 * model.num_steps + 1 + 2 * config.surrogate().renoised + noised_times(config)
    shared = config.cluster.share_base  # then the learner's process holds the base
    whole = sizes.trained * item if shared else base_bytes(model, sizes.transformer, sizes.linears)
    shares = [Share("adapters" if shared else "weights", whole)]
    if config.broadcasts:
        shares.append(Share("versions received ahead", config.staleness * sizes.trained * item))
    if config.learners.base_penalty is not None:
        budget = config.surrogate().max_terms(model.num_steps)
        kept += budget.terms + budget.junction if config.rewards.differentiable else noised_times(config)
        if config.learners.lora is None:
            shares.append(Share("frozen base", sizes.transformer * item))
    base_alone_guided = one_branch(costs.backbone, model.guidance)  # only then may its forward be the larger one
    guidance = held_guidance(config)[1] if base_alone_guided else model.guidance
    if config.drift.on and not one_branch(costs.backbone, model.guidance):
        kept += model.num_steps + config.surrogate().renoised
    shares += [
        Share("activations, no gradient", costs.rollout(config, rows, guidance).peak, "rollout"),
        Share("states and velocities", rows * kept * latent, "rollout"),
    ]
    if config.evaluation.prompts:
        rows, kept = evaluated_at_once(config), 2 * (config.evaluation.num_steps or model.num_steps) + 1
        guidance = max([*config.evaluation.guidance, *config.evaluation.guidance_ends])
        shares.append(Share("activations, no gradient", costs.rollout(config, rows, guidance).peak, "evaluation"))
        shares.append(Share("states and velocities", rows * kept * latent, "evaluation"))
    return replace(role("samplers", config.samplers, shares), process=not shared)


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
    return config.rewards.at_once(rows, config.backbone.height, config.backbone.width)


def evaluated_at_once(config: RunConfig) -> int:
    """Rows of one item of an evaluation."""
    return min(config.evaluation.batch, config.evaluation.limit or config.evaluation.batch)


def latent_bytes(costs: Costs, itemsize: int) -> int:
    """Bytes of one latent."""
    size = itemsize
    for side in costs.latent_shape:
        size *= side
    return size


def prompt_bytes(costs: Costs) -> int:
    """Bytes of one encoded prompt, the longest."""
    return sum(tensor.nbytes for tensor in costs.backbone.conditioning_skeleton().values())
