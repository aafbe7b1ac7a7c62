"""The learner: one optimizer step from cached states and cotangents. It reads the items' plans, never the method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.backbones.embeddings import Embeddings
from flowbp_ray.backbones.frozen import load_base
from flowbp_ray.backbones.guidance import forward_guidance, trained_velocity
from flowbp_ray.backbones.kernels import use_kernels
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.config.nft import NftConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import BackboneConfig
from flowbp_ray.learning.engine import Engine, TorchEngine
from flowbp_ray.learning.forward import ForwardSettings, ForwardSweep
from flowbp_ray.learning.observer import SweepObserver
from flowbp_ray.learning.optim import lr_factor
from flowbp_ray.messages import Fault, Item, Optimality, Packed, Rollout, StepReport, unpack
from flowbp_ray.surrogate import Method, Plan, append_dims
from flowbp_ray.surrogate.backward import SweepReport, sweep
from flowbp_ray.surrogate.penalty import base_penalty
from flowbp_ray.surrogate.trajectory import Velocity
from flowbp_ray.utils.checksums import TensorChecksum
from flowbp_ray.utils.digest import digest_of_parts
from flowbp_ray.utils.tracing import span
from flowbp_ray.weights import trainable
from flowbp_ray.weights.buckets import assign_buckets
from flowbp_ray.weights.packing import PackedTensors, Packer


class Learner:
    """One learner rank: the transformer, its engine and a step's embeddings; neither decoder nor reward."""

    def __init__(
        self,
        backbone: BackboneConfig,
        learners: LearnersConfig,
        method: Method,
        embeddings: Embeddings | None = None,
        *,
        steps: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        base: nn.Module | None = None,
        nft: NftConfig | None = None,
    ) -> None:
        """embeddings: may be set later, before each step those of its prompts. batch: rows of the global batch.
        nft: how terms without gradient are learned.

        steps: optimizer steps of the run, for the learning rate schedule.
        seed: initialises the adapters. An engine over several ranks needs the process group to be joined before.
        base: a loaded base on the learner's device, whose tensors are used and not changed.
        """
        self.model, self.config, self.steps, self.batch = backbone, learners, steps, batch
        self.nft, self.rank, self.embeddings = nft or NftConfig(), rank, embeddings or Embeddings({})
        self.backbone = build_backbone(backbone)
        self.sigmas = self.backbone.sigmas(backbone.num_steps, backbone.height, backbone.width)
        self.terms = method.max_terms(backbone.num_steps).terms
        transformer: Any = load_base(self.backbone, backbone, learners.device, base)
        trainable.prepare(transformer, learners.lora, seed, self.backbone.lora_targets)
        if learners.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train().to(learners.device)
        use_kernels(transformer, backbone.compile, backbone.attention)
        self.engine: Engine = make_engine(transformer, learners, backbone.torch_dtype)
        self.buckets, self.packer = assign_buckets(self.engine.sizes(), learners.count), Packer()

    def step(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        cotangents: Sequence[Packed],
        factors: Sequence[float],
        shares: Sequence[float] = (),
        optimality: Optimality | None = None,
    ) -> StepReport:
        """Sum one VJP per active node of this rank's items, and per noised sample; then update the weights.

        cotangents: dL/dtarget of each item, [rows, branches, ...] fp32. factors: multiply each row's cotangent, 0 for
        a masked row and batch / kept for the others. shares: with balanced rewards, multiply each term's cotangent;
        the cotangents are then [terms, rows, branches, ...]. optimality: of this rank's rows, for the noised samples.
        """
        started = time.perf_counter()
        optimizer = self.config.optimizer
        items = [r.item for r in rollouts]
        states, plans = self._here(r.states for r in rollouts), plans_of(items)
        scale = self._there(torch.tensor(factors, dtype=torch.float32)) * self.engine.scale
        cotangent = self._cotangent(cotangents, shares, scale)
        base = self._optional(r.base for r in rollouts) if len(states) else None
        observer = SweepObserver(items, self.sigmas, self._optional(r.velocities for r in rollouts), base)
        penalty, forward = self._penalty(plans, base, scale), self._forward(rollouts, optimality)
        with span("sweep"):
            swept = self._sweep(items, states, cotangent, observer, penalty, forward, scale)
        backward_done = time.perf_counter()
        lr = optimizer.lr * lr_factor(optimizer.schedule, step, self.steps)
        if self.engine.ema is not None:
            self.engine.ema.begin(step)
        with span("optimizer step"):
            norm = self.engine.step(lr)
        faults = observer.faults() + (forward.faults() if forward else ())
        if not math.isfinite(norm) and not faults and len(states):
            faults = self._bad_gradients(items, states, cotangent, penalty)
        moved = forward.per_sample() if forward else ((), (), (), ())
        ended = time.perf_counter()
        return StepReport(
            step=step,
            rank=self.rank,
            grad_norm=norm,
            learning_rate=lr,
            forwards=swept.forwards,
            rows=swept.rows,
            padding=swept.padding,
            seconds=ended - started,
            drift=observer.drift(),
            base_distance=moved[3] if forward and forward.base is not None else observer.base_distance(),
            faults=faults,
            timings={"sweep_s": backward_done - started, "optimizer_s": ended - backward_done},
            forward_loss=moved[0],
            old_distance=moved[1],
            signal=moved[2],
        )

    def _sweep(
        self,
        items: Sequence[Item],
        states: Tensor,
        cotangent: Tensor,
        observer: SweepObserver,
        penalty: Callable[[Tensor, Tensor], Tensor] | None,
        forward: ForwardSweep | None,
        scale: Tensor,
    ) -> SweepReport:
        """Accumulate the gradients at the surrogate's states, if there are any, and at the noised samples."""
        swept = SweepReport(0, 0, 0)
        if len(states):
            swept = sweep(
                self._velocity(items),
                plans_of(items),
                states,
                cotangent,
                micro_batch=self.config.micro_batch,
                fuse=self.config.fuse,
                backward=self.engine.backward,
                terms_per_sample=self.terms,
                observe=observer,
                penalty=penalty,
                closes=forward is None,
            )
        if forward is not None:
            velocity = self._velocity(items, guidance=forward_guidance(self.backbone, items[0].guidance))
            swept += forward.run(velocity, scale / self.batch, self.engine.backward)
        return swept

    @torch.no_grad()
    def drift(self, rollouts: Sequence[Rollout]) -> tuple[float, ...]:
        """Measure the drift of each row by a pass over the active nodes without gradient."""
        items = [r.item for r in rollouts]
        states = self._here(r.states for r in rollouts)
        observer = SweepObserver(items, self.sigmas, self._optional(r.velocities for r in rollouts))
        velocity, places = self._velocity(items), torch.tensor(observer.places)
        # ZeRO-3 needs the same number of forwards on every rank, so repeat the last state up to the largest number.
        most = len(plans_of(items)) * (self.terms + 1)
        padded = torch.arange(most).clamp(max=len(places) - 1)
        for part in padded.split(self.config.micro_batch * self.config.fuse):
            sample, node = self._there(places[part]).unbind(1)
            observer(part, velocity(states[self._there(part)], node, sample))
        return observer.drift()

    def _here(self, parts: Iterable[Packed]) -> Tensor:
        """Concatenate the rows of all parts on this learner's device."""
        return self._there(torch.cat([unpack(part) for part in parts]))

    def _optional(self, parts: Iterable[Packed | None]) -> Tensor | None:
        """Concatenate optional tensors of the rollouts [R, ...] likewise; None if the samplers did not send any."""
        sent = [part for part in parts if part is not None]
        return self._here(sent) if sent else None

    def _there(self, tensor: Tensor) -> Tensor:
        """Move a tensor to this learner's device without waiting for what is queued there."""
        return tensor.to(self.config.device, non_blocking=True)

    def _cotangent(self, cotangents: Sequence[Packed], shares: Sequence[float], scale: Tensor) -> Tensor:
        """All rows' cotangents [rows, branches, ...] times scale [rows]; with `shares` the sum of terms times these."""
        whole = self._there(torch.cat([unpack(part) for part in cotangents], dim=1 if shares else 0))
        if shares:
            whole = torch.tensordot(self._there(torch.tensor(shares, dtype=torch.float32)), whole, dims=1)
        return whole * append_dims(scale, whole.dim())

    def _forward(self, rollouts: Sequence[Rollout], optimality: Optimality | None) -> ForwardSweep | None:
        """What terms without gradient make this rank compute; None without such terms, or if nothing can be learned."""
        if optimality is None or not optimality.slots:
            return None
        learners, penalty = self.config, self.config.base_penalty
        settings = ForwardSettings(
            self.nft.beta, self.nft.clip, penalty.weight if penalty else 0.0, learners.micro_batch * learners.fuse
        )
        return ForwardSweep(rollouts, self.sigmas, optimality, settings)

    def _velocity(
        self, items: Sequence[Item], module: nn.Module | None = None, guidance: float | None = None
    ) -> Velocity:
        """The velocity that is differentiated, with the prompts of these items, at their guidance or another."""
        prompts = [prompt for item in items for prompt in item.prompt_ids]
        return trained_velocity(
            self.backbone,
            module or self.engine.module,
            self.sigmas,
            self.embeddings.rows(prompts),
            self.embeddings.negative(len(prompts)),
            items[0].guidance if guidance is None else guidance,
            self.model.detach_negative,
        )

    def _penalty(
        self, plans: Sequence[Plan], base: Tensor | None, scale: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The `penalty` of the sweep, with each row multiplied by `scale` as the reward's cotangent is; or None."""
        settings = self.config.base_penalty
        if base is None or settings is None or settings.weight == 0:
            return None
        return base_penalty(plans, base, settings.weight * scale / self.batch)

    def _bad_gradients(
        self,
        items: Sequence[Item],
        states: Tensor,
        cotangents: Tensor,
        penalty: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Fault, ...]:
        """Find the samples whose gradients are not finite, one at a time. No gradient is accumulated."""
        if self.config.engine == "deepspeed" and self.config.zero == 3:
            return ()  # the parameters are partitioned; the driver's message names the step only
        parameters = list(trainable.trained(self.engine.bare).values())
        velocity = self._velocity(items, self.engine.bare)
        return SweepObserver(items, self.sigmas).bad_gradients(velocity, parameters, states, cotangents, penalty)

    def publish(self, ema: bool = False) -> Iterator[PackedTensors]:
        """Yield this rank's buckets of the trained weights (with `ema` their average), for the samplers.

        All ranks must iterate to the end. A yielded bucket may share the weights' memory: copy it before requesting
        the next.
        """
        parts = zip(self.buckets, self.engine.parts(self.buckets, ema), strict=True)
        yield from self.packer.stream(tensors for bucket, tensors in parts if bucket.rank == self.rank)

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        """This rank's part of the weights' fingerprint, from its fp32 masters cast to the published dtype."""
        return self.engine.checksums(ema)

    def digest(self) -> str:
        """sha256 of the trained weights."""
        in_order = dict(sorted(self.engine.sizes().items()))
        return digest_of_parts(self.engine.parts(assign_buckets(in_order)))

    def save(self, folder: str) -> dict[str, str]:
        return self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        self.engine.load(Path(folder))


def plans_of(items: Sequence[Item]) -> list[Plan]:
    return [plan for item in items for plan in item.plans]


def make_engine(module: nn.Module, config: LearnersConfig, dtype: torch.dtype) -> Engine:
    """Build the engine that `learners.engine` names."""
    if config.engine == "torch":
        return TorchEngine(module, config)
    from flowbp_ray.learning.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, config, dtype)


def build_learner(
    config: RunConfig, embeddings: Embeddings | None = None, rank: int = 0, base: nn.Module | None = None
) -> Learner:
    """Build a learner rank of a run in this process. With DeepSpeed, join the process group before. base: as there."""
    return Learner(
        config.backbone,
        config.learners,
        config.surrogate(),
        embeddings,
        steps=config.steps,
        batch=config.data.shape.batch,
        seed=config.seed,
        rank=rank,
        base=base,
        nft=config.nft,
    )
