"""The `learners:` section: engine, what is trained, and the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flowbp_ray.utils.settings import PoolConfig, Strict


class LoraConfig(Strict):
    """Low-rank adapters (peft), which are trained instead of the weights."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(16, ge=1)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: list[str] | None = None
    """Names of the modules that get an adapter, as peft's target_modules. null: the backbone's own choice."""


class ScheduleConfig(Strict):
    """The learning rate over the run's steps: linear warm-up, then what `name` says."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Course after the warm-up. constant: stays at lr. linear, cosine: falls to `end` times lr at the last step."""
    warmup: int = Field(0, ge=0)
    """Steps over which the rate rises to lr; must be below `steps`. 0: no warm-up."""
    end: float = Field(0.0, ge=0, le=1)
    """Rate at the end of a linear or cosine schedule, as a fraction of lr."""


class EmaConfig(Strict):
    """An exponential moving average of the trained weights in float32; evaluations and pictures use it."""

    decay: float = Field(0.999, gt=0, lt=1)
    """Share of the average that is kept at each optimizer step: average = decay · average + (1 − decay) · weights."""
    ramp: float | None = Field(None, gt=0)
    """The share rises to `decay` by so much in each step, from 0: min(decay, ramp · step), step counted from 1. null:
    it is `decay` from the start."""

    def at(self, step: int) -> float:
        """The share that is kept in optimizer step `step`, from 0."""
        return self.decay if self.ramp is None else min(self.decay, self.ramp * (step + 1))


class BasePenaltyConfig(Strict):
    """A penalty on the distance to the base model: weight · mean square of v − v_base at the active nodes."""

    weight: float = Field(ge=0)
    """Factor of the penalty in the loss. 0: the distance is only measured and changes nothing."""
    guidance: float | None = Field(None, ge=1)
    """Guidance scale of the base's velocity. One that is not the run's is distilled: with backbone.guidance=1, and 3
    here, the model learns to draw without guidance what the base draws with 3, whatever the rewards. For flux1 it is
    the value of the model's guidance input. null: that of the velocity which is learned, so the run's; without a method
    none, and for flux1 the run's."""


class OptimizerConfig(Strict):
    """AdamW with clipping of the gradient."""

    lr: float = Field(1e-5, gt=0)
    """Learning rate, per optimizer step; `schedule` may multiply it."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of AdamW's two moments, per optimizer step."""
    eps: float = Field(1e-8, gt=0)
    """Number that AdamW adds to the denominator."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay: at each step weights shrink by lr · weight_decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient; a longer one is scaled down to it."""
    moments: Literal["fp32", "int8"] = "fp32"
    """How AdamW's two moments are kept. fp32: 8 bytes per trained parameter. int8: 2, in blocks of 256 with a scale
    each (arXiv 2110.02861), which changes results; it needs learners.engine=torch and the extra `quant`."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate changes over the run."""


MOVES = ("count", "engine", "zero", "offload", "micro_batch", "fuse", "gradient_checkpointing")
"""Keys of `learners` that say where and in which order the same sums are computed. A continuation may change them; then
results differ by rounding."""


class LearnersConfig(PoolConfig):
    """The learners: ranks that compute parameter gradients and update the weights."""

    engine: Literal["torch", "deepspeed"] = "deepspeed"
    """torch: plain AdamW on one rank. deepspeed: ZeRO over `count` ranks."""
    zero: Literal[0, 1, 2, 3] = 2
    """ZeRO stage of deepspeed: what is sharded over the ranks. 0: nothing. 1: optimizer state. 2: gradients too.
    3: weights too."""
    offload: bool = False
    """true: optimizer state stays in host memory and AdamW runs there. It is slower and takes 12 bytes per trained
    parameter less on the GPUs, all ranks together. Needs deepspeed with zero of at least 1."""
    threads: int | None = Field(None, ge=1)  # type: ignore[assignment]
    """CPU threads that torch computes with in each process. null: 1; where `offload` brings AdamW from a GPU to the
    host, the rank's even part of its node's cores."""
    interconnect: Literal["nvlink", "pcie"] = "nvlink"
    """What connects the GPUs of deepspeed's ranks. nvlink: gradients are exchanged after each backward. pcie: they are
    exchanged while the backward goes on, which takes a second buffer of 500 M elements; with it write zero=1 where the
    memory is there, because from zero=2 on gradients are exchanged in every backward and not once a step.
    `flowbp-ray plan` prints the bytes."""
    micro_batch: int = Field(ge=1)
    """Samples that a rank works on at a time. A rank's part of the batch must be divisible by it."""
    fuse: int = Field(1, ge=1)
    """Active nodes of these samples that share one forward: it has up to micro_batch × fuse rows. More is faster
    where the GPU has room."""
    gradient_checkpointing: bool = False
    """true: activations are computed again in the backward pass, which takes less memory and more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters. null: train all weights of the transformer."""
    ema: EmaConfig | None = None
    """Keep an average of the weights for evaluations. null: evaluations use the weights themselves."""
    base_penalty: BasePenaltyConfig | None = None
    """Penalise, or only measure, the distance to the base model (docs/staying-near-the-base.md). null: neither."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its learning rate."""

    @property
    def moves(self) -> dict[str, object]:
        """The values of `MOVES`, and how the moments are kept."""
        return {key: getattr(self, key) for key in MOVES} | {"optimizer.moments": self.optimizer.moments}

    @property
    def host_bound(self) -> bool:
        """Whether AdamW runs on the host while the forwards run on a GPU."""
        return self.offload and self.gpus > 0
