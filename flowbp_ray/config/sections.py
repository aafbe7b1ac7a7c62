"""The sections of a run's configuration, one class each. `schema.RunConfig` puts them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass

from typing import Annotated, Literal

from pydantic import Field, field_validator

from flowbp_ray.utils import addresses
from flowbp_ray.utils.settings import PoolConfig, ProcessConfig, Strict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BackboneConfig(Strict):
    """Which model, and how it is sampled. guidance 1 means none; detach_negative: no gradient through v_neg.

    dtype: of the weights that compute; the masters are fp32. There is no float16: gradients would need loss scaling.
    sigmas: `pipeline` is the grid of the family's pipeline in diffusers, `even` steps evenly before the shift. They
    differ for sd35 only, whose published runs are even.
    """

    name: str
    path: str | None = None
    height: int = Field(64, gt=0)
    width: int = Field(64, gt=0)
    num_steps: int = Field(25, ge=1)
    guidance: float = Field(1.0, ge=1.0)
    detach_negative: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    sigmas: Literal["pipeline", "even"] = "pipeline"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class DataConfig(Strict):
    """prompts: a .txt, .jsonl or .parquet file, or shapes:<split>."""

    prompts: str
    prompts_per_step: int = Field(ge=1)
    images_per_prompt: int = Field(1, ge=1)
    rollout_batch: int = Field(ge=1)

    @property
    def shape(self) -> BatchShape:
        return BatchShape(self.prompts_per_step, self.images_per_prompt, self.rollout_batch)


class EncoderConfig(ProcessConfig):
    """Encodes the prompts before anything else, and ends.

    cache: the folder of embeddings on disk that runs share, or null for none. auto: `embeddings` below
    $FLOWBP_RAY_CACHE, where that is set, else below flowbp_ray in $XDG_CACHE_HOME or ~/.cache.
    """

    cache: str | None = Field("auto", min_length=1)

    @field_validator("cache")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Relative to where the command runs: actors run elsewhere."""
        return value if value == "auto" else addresses.absolute(value)


class LoraConfig(Strict):
    """Train low-rank adapters instead of all weights (peft). targets: None means the backbone's own choice."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(16, ge=1)
    targets: list[str] | None = None


class ScheduleConfig(Strict):
    """The learning rate over the run's steps: linear warm-up, then constant, or falling to `end` times the rate."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)
    end: float = Field(0.0, ge=0, le=1)


class EmaConfig(Strict):
    """An fp32 average of the trained weights, one update per optimizer step; evaluations and pictures use it."""

    decay: float = Field(0.999, gt=0, lt=1)


class BasePenaltyConfig(Strict):
    """weight · mean square of v_theta − v_base at the active nodes, added to the loss; 0 only measures the distance."""

    weight: float = Field(ge=0)


class OptimizerConfig(Strict):
    """AdamW, clipping by the global gradient norm."""

    lr: float = Field(1e-5, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()


class LearnersConfig(PoolConfig):
    """engine `torch` is plain AdamW on one rank; `deepspeed` shards over `count` ranks at ZeRO stage `zero`.

    offload: masters and moments stay in host memory and AdamW runs there: slower, 12 bytes a parameter less on the GPU.
    """

    engine: Literal["torch", "deepspeed"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = 2
    offload: bool = False
    micro_batch: int = Field(ge=1)
    fuse: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    ema: EmaConfig | None = None
    base_penalty: BasePenaltyConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()


class EvaluationConfig(Strict):
    """Every `every` steps (0: only before and after), the same noise and prompts each time, once per guidance.

    `guidance` is measured every time, `guidance_ends` only before and after. num_steps: None means backbone.num_steps.
    """

    prompts: str | None = None
    every: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=1)
    batch: int = Field(30, ge=1)
    num_steps: int | None = Field(None, ge=1)
    guidance: list[float] = Field([1.0])
    guidance_ends: list[float] = Field([])
    pictures: int = Field(36, ge=1)
    seed: int = 7


class GuardConfig(Strict):
    """Ends a run whose reward is being hacked; needs evaluations in its course.

    metrics: name -> margin, in the metric's unit: monitors, the verifier, judges. Where one is more than its margin
    below its start for `patience` evaluations in a row, while a reward that is trained on is above its start, then
    warn; stop: end the run there; rollback: end it with the weights of the evaluation that was best.
    """

    metrics: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    patience: int = Field(2, ge=1)
    action: Literal["warn", "stop", "rollback"] = "stop"


class CheckpointConfig(Strict):
    """Every `every` steps (0: only at the end); the newest `keep` stay."""

    every: int = Field(0, ge=0)
    keep: int = Field(2, ge=1)


class DriftConfig(Strict):
    """How far the states have aged: the meter costs K velocities per image on the way to the learner.

    max: samples above it are masked, and the mean is taken over the others; costs a pass without gradient.
    """

    meter: bool = False
    max: float | None = Field(None, gt=0)

    @property
    def on(self) -> bool:
        return self.meter or self.max is not None


class TrackingConfig(Strict):
    """wandb: log there too; offline unless an API key is set."""

    wandb: bool = False
    project: str = "flowbp_ray"


class ClusterConfig(Strict):
    """address: local starts a private Ray; auto joins a running one (what a submitted job does by itself).

    tries: of an item before the run stops, and of the learners without a step in between. stall_timeout: seconds
    without an answer. placement_timeout: seconds to find room for a pool, or for the cluster to grow. deterministic:
    only deterministic GPU kernels (slower; CPUs are deterministic anyway). scaling: who changes the sizes of samplers
    and rewards within their min and max: a hand, by `flowbp-ray scale`, or also the rule of `control.scaling`.
    colocate: samplers, reward servers and the one learner share a GPU, whatever their gpus are: each process gets an
    equal part, with room for as many as there may be. transport: how weights reach the samplers; there is one so far.
    """

    address: str = "local"
    tries: int = Field(3, ge=1)
    stall_timeout: float = Field(600.0, gt=0)
    placement_timeout: float = Field(30.0, gt=0)
    deterministic: bool = False
    scaling: Literal["hand", "rule"] = "hand"
    colocate: bool = False
    transport: str = "object_store"


@dataclass(frozen=True)
class BatchShape:
    """The batch words: batch = prompts_per_step × images_per_prompt, cut into items of rollout_batch rows."""

    prompts_per_step: int
    images_per_prompt: int
    rollout_batch: int

    @property
    def batch(self) -> int:
        return self.prompts_per_step * self.images_per_prompt

    @property
    def items(self) -> int:
        return self.batch // self.rollout_batch
