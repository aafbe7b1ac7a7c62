"""A run's configuration: pydantic models. `flowbp_ray.config.loading` reads them from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from flowbp_ray.config.data import DataConfig, check_held_out, verified
from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.config.method import build_method
from flowbp_ray.config.nft import NftConfig, check_drift, check_nft
from flowbp_ray.config.one_card import check_one_card, share_a_gpu
from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.config.sections import (
    BackboneConfig,
    CheckpointConfig,
    ClusterConfig,
    DriftConfig,
    EncoderConfig,
    EvaluationConfig,
    GuardConfig,
    NonFinite,
    TrackingConfig,
)
from flowbp_ray.judges.config import JudgeConfig, check_judged_terms, check_names_and_ports
from flowbp_ray.surrogate import Method
from flowbp_ray.utils.addresses import UserPath
from flowbp_ray.utils.settings import ElasticPoolConfig, Strict


class RunConfig(Strict):
    """Everything a run is. `flowbp-ray train` takes one of these as YAML."""

    name: str = Field(pattern=r"^[\w.+-]*\w[\w.+-]*$", max_length=200)
    """Name of the run, and of its folder below `output`."""
    seed: int = Field(42, ge=0)
    """Seed of noise, order of the prompts and jitter."""
    plan_seed: int = Field(114, ge=0)
    """Seed of the method's draws: which nodes are active in each step."""
    steps: int = Field(ge=1)
    """Number of optimizer steps."""
    staleness: int = Field(0, ge=0)
    """Steps by which the weights that draw a batch are older than those that learn from it. 0: sampling and learning
    take turns. 1 or more: they overlap. Above 1 drift.max is needed."""
    output: UserPath = "runs"
    """Folder in which the run's folder is made. On a cluster all nodes must see it at this path."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint of output/name where there is one. never: start anew; a taken name gets
    a number."""
    nonfinite: NonFinite = "stop"
    """What happens where a sample holds a NaN or an infinity. stop: the run ends and names it. skip_sample: the sample
    is left out. skip_step: the whole step changes nothing, which a bad gradient always costs."""
    backbone: BackboneConfig
    """Which model is trained, and how it is sampled."""
    method: dict[str, Any] | None = None
    """How the gradient is found: one of the named methods with its arguments, any axis of it replaced, or all axes
    spelled out. null: no term has a gradient."""
    nft: NftConfig = NftConfig()
    """How terms without gradient are learned."""
    data: DataConfig
    """The training prompts and the size of a batch."""
    encoder: EncoderConfig = EncoderConfig()
    """The process that encodes the prompts."""
    samplers: ElasticPoolConfig = ElasticPoolConfig()
    """The processes that draw images and keep their trajectories."""
    rewards: RewardsConfig
    """What is trained on, what is measured, and the processes that score."""
    judges: list[JudgeConfig] = Field([])
    """Vision-language models that look at finished pictures (docs/judges.md)."""
    learners: LearnersConfig
    """The ranks that train, and the optimizer."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements on held-out prompts."""
    guard: GuardConfig | None = None
    """Ends the run when the reward is being hacked. null: nothing does."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    drift: DriftConfig = DriftConfig()
    """How far sampled trajectories may be behind the weights."""
    tracking: TrackingConfig = TrackingConfig()
    """Weights & Biases."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster, time limits and retries."""

    @model_validator(mode="before")
    @classmethod
    def _colocated(cls, data: Any) -> Any:
        return share_a_gpu(data)

    @field_validator("method")
    @classmethod
    def _method(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        build_method(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        build_method(self.method).check(self.backbone.num_steps)
        check_together(self)
        return self

    def surrogate(self) -> Method:
        """The method as a value."""
        return build_method(self.method)

    @property
    def shows_samples(self) -> bool:
        """Whether a judge looks at the training samples."""
        return any(judge.role != "monitor" for judge in self.judges)

    @property
    def rolls_back(self) -> bool:
        """Whether a guard may end the run with an earlier checkpoint."""
        return self.guard is not None and self.guard.action == "rollback"

    @property
    def broadcasts(self) -> bool:
        """Whether learner rank 0 broadcasts weights to the samplers."""
        return self.cluster.transport == "nccl" and self.learners.lora is None and self.nft.policy == "current"

    @property
    def trained_on(self) -> list[str]:
        """Names of the metrics that are trained on: the terms, and the exact verifier where one of them is it."""
        terms = self.rewards.terms
        exact = any((term.kind or term.name) == "shapes_verifier" for term in terms)
        return [*(term.name for term in terms), *(["verifier"] if exact else [])]

    @property
    def judged(self) -> list[str]:
        """The metrics of judges that are monitors."""
        return [metric for judge in self.judges if judge.role == "monitor" for metric in judge.metrics.values()]

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / self.name


def check_together(config: RunConfig) -> None:
    """Raises ValueError for values that are valid each by itself but not together."""
    check_held_out(config.data, config.evaluation.prompts, config.evaluation.columns, config.evaluation.split)
    _check_batch(config)
    _check_engine(config)
    _check_gpus(config)
    check_nft(
        config.rewards, config.surrogate(), config.nft, config.data, config.backbone, config.learners.ema is not None
    )
    check_drift(config.surrogate(), config.drift)
    check_one_card(config.backbone, config.learners, config.samplers, config.cluster, config.staleness)
    _check_transport(config)
    _check_scaling(config)
    _check_guard(config)
    _check_judges(config)


def _check_batch(config: RunConfig) -> None:
    """Sizes that must be divisible by others; the message says which number to write."""
    data, learners = config.data, config.learners
    batch, ranks, size = data.shape.batch, learners.count, data.rollout_batch
    if batch % size:
        raise ValueError(
            f"the batch of {batch} rows (prompts_per_step x images_per_prompt) is not divisible by "
            f"data.rollout_batch={size}; write data.rollout_batch={_divisor(batch, size)}"
        )
    if size % data.sampled_at_once:
        raise ValueError(
            f"data.rollout_micro_batch={data.sampled_at_once} does not divide data.rollout_batch={size}; write "
            f"data.rollout_micro_batch={_divisor(size, data.sampled_at_once)}"
        )
    if learners.engine == "torch" and ranks != 1:
        raise ValueError(f"learners.engine=torch runs on one rank, got learners.count={ranks}; write learners.count=1")
    if batch // size % ranks:
        items = -(-(batch // size) // ranks) * ranks
        raise ValueError(
            f"{batch // size} items of {size} rows cannot be shared by learners.count={ranks}; write "
            f"learners.count={_divisor(batch // size, ranks)}, or a batch of {items * size} rows"
        )
    rows = batch // ranks
    if rows % learners.micro_batch:
        raise ValueError(
            f"a learner's {rows} rows are not divisible by learners.micro_batch={learners.micro_batch}; "
            f"write learners.micro_batch={_divisor(rows, learners.micro_batch)}"
        )


def _check_gpus(config: RunConfig) -> None:
    """What Ray can reserve (whole GPUs, or a part of one), and NCCL can connect."""
    pools = {"encoder": config.encoder, "samplers": config.samplers, "rewards": config.rewards}
    for name, pool in (pools | {"learners": config.learners}).items():
        if pool.gpus > 1 and not float(pool.gpus).is_integer():
            raise ValueError(f"{name}.gpus={pool.gpus:g}: above 1 it must be a whole number; write {int(pool.gpus)}")
    if config.rewards.url and config.rewards.gpus:
        raise ValueError(
            f"rewards.gpus={config.rewards.gpus:g} would wait for GPUs that rewards.url has no use for; "
            "write rewards.gpus=0, or rewards.url=null (as for serve-reward)"
        )
    learners = config.learners
    if config.cluster.colocate is True and learners.count > 1:
        raise ValueError("cluster.colocate=true could put two ranks on one GPU, where NCCL cannot connect them; "
                         "write learners.count=1, or cluster.colocate=false")  # fmt: skip
    if 0 < learners.gpus < 1 and learners.count > 1 and config.cluster.colocate != "pairs":
        raise ValueError(
            f"learners.gpus={learners.gpus:g} could put two ranks on one GPU, where NCCL cannot connect them; "
            "write learners.gpus=1, or learners.count=1"
        )


def _check_transport(config: RunConfig) -> None:
    """Broadcasts are between GPUs or between CPUs, and NCCL connects no two processes on one GPU."""
    if not config.broadcasts:
        return
    gpus = {"samplers": config.samplers.gpus, "learners": config.learners.gpus}
    if len({number > 0 for number in gpus.values()}) > 1:
        without = next(name for name, number in gpus.items() if not number)
        raise ValueError(
            f"cluster.transport=nccl connects GPUs with GPUs or CPUs with CPUs; write {without}.gpus=1, or "
            "cluster.transport=object_store"
        )
    for name, number in gpus.items():
        if 0 < number < 1:
            raise ValueError(
                f"cluster.transport=nccl needs a GPU for each process, got {name}.gpus={number:g}"
                f"{' of cluster.colocate' * bool(config.cluster.colocate)}; write cluster.transport=object_store"
            )


def _check_scaling(config: RunConfig) -> None:
    """Scaling by rule needs pools that may change, and roles that overlap: in lockstep they all wait."""
    if config.cluster.scaling != "rule":
        return
    if config.staleness == 0:
        raise ValueError("cluster.scaling=rule needs staleness=1 or more, or the roles wait for one another anyway")
    if all(len(set(pool.bounds)) == 1 for pool in (config.samplers, config.rewards)):
        raise ValueError("cluster.scaling=rule has nothing to change; write samplers.min and samplers.max")


def _check_guard(config: RunConfig) -> None:
    """A guard needs evaluations in the course of the run, and metrics that are measured but not trained on."""
    if config.guard is None:
        return
    if config.evaluation.prompts is None or not config.evaluation.every:
        raise ValueError("guard judges evaluations in the run's course; write evaluation.prompts and evaluation.every")
    if not config.evaluation.guidance:
        raise ValueError("guard judges evaluations at the first of evaluation.guidance; write one, such as [1.0]")
    trained = {term.name for term in config.rewards.terms}
    known = [*(monitor.name for monitor in config.rewards.monitors), *config.judged]
    known += verified(config.data, config.evaluation.prompts)
    for name in config.guard.metrics:
        if name in trained:
            raise ValueError(f"guard.metrics names {name!r}, which is trained on; write what is only measured")
        if name not in known:
            raise ValueError(f"guard.metrics names {name!r}, which is not measured; write one of {', '.join(known)}")


def _check_judges(config: RunConfig) -> None:
    """Judges need distinct names and ports, and monitors need evaluations whose pictures they can judge."""
    check_names_and_ports(config.judges, {"verifier", *(reward.name for reward in config.rewards.all)})
    check_judged_terms(config.judges, {term.name for term in config.rewards.terms if term.judged})
    if config.shows_samples and config.rewards.url:
        raise ValueError("a gate and a judge with role=reward look at pictures, which remote reward servers keep; "
                         "write rewards.url=null")  # fmt: skip
    for judge in config.judges:
        if judge.role == "monitor" and config.evaluation.prompts is None:
            raise ValueError(f"judge {judge.name!r} looks at the pictures of evaluations; write evaluation.prompts")


def _check_engine(config: RunConfig) -> None:
    """Combinations that an engine cannot do, staleness without a bound on drift, and a warm-up that never ends."""
    learners = config.learners
    if learners.engine == "deepspeed" and learners.zero == 0 and config.backbone.dtype != "float32":
        raise ValueError(
            f"learners.zero=0 keeps no fp32 masters of {config.backbone.dtype} weights; write learners.zero=1"
        )
    if config.backbone.compile and learners.engine == "deepspeed" and learners.zero == 3:
        raise ValueError(
            "backbone.compile=blocks: ZeRO-3 gathers weights in hooks, which cannot be compiled; write learners.zero=2"
        )
    if learners.offload and (learners.engine == "torch" or learners.zero == 0):
        raise ValueError("learners.offload needs shards: write learners.engine=deepspeed and learners.zero=1 or more")
    if learners.optimizer.moments == "int8" and learners.engine != "torch":
        raise ValueError("learners.optimizer.moments=int8 is there for one rank; write learners.engine=torch, or "
                         "learners.optimizer.moments=fp32, which deepspeed shards over its ranks")  # fmt: skip
    if config.staleness > 1 and config.drift.max is None and config.rewards.differentiable:
        raise ValueError(
            f"staleness={config.staleness} needs drift.max (samples that aged more are masked); "
            "write drift.max=0.05, or staleness=1"
        )
    if learners.optimizer.schedule.warmup >= config.steps:
        raise ValueError(
            f"learners.optimizer.schedule.warmup={learners.optimizer.schedule.warmup} is not below steps={config.steps}"
        )


def _divisor(number: int, near: int) -> int:
    """The largest divisor of `number` that is at most `near`."""
    return max(d for d in range(1, min(number, near) + 1) if number % d == 0)
