"""One optimizer step from cached states and cotangents. Knows no method: only the plans that the items carry."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.backbones import Embeddings
from flowbp_ray.backbones.guidance import trained_velocity
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.learning.engine import Engine, TorchEngine
from flowbp_ray.learning.observer import SweepObserver
from flowbp_ray.learning.optim import lr_factor
from flowbp_ray.messages import Fault, Item, Packed, Rollout, StepReport, TensorChecksum, unpack
from flowbp_ray.surrogate import Plan, append_dims
from flowbp_ray.surrogate.backward import sweep
from flowbp_ray.surrogate.penalty import base_penalty
from flowbp_ray.surrogate.trajectory import Velocity
from flowbp_ray.utils.digest import digest_of_parts
from flowbp_ray.utils.tracing import span
from flowbp_ray.weights import trainable
from flowbp_ray.weights.buckets import divide
from flowbp_ray.weights.packing import Packer, Parcel


class Learner:
    """One rank: the transformer, its engine, the prompt embeddings.

    No decoder, no reward, and where the negative branch is detached not that either.
    """

    def __init__(self, config: RunConfig, embeddings: Embeddings, rank: int = 0) -> None:
        model, learners = config.backbone, config.learners
        self.config, self.rank, self.embeddings = config, rank, embeddings
        self.backbone = build_backbone(model)
        self.sigmas = self.backbone.sigmas(model.num_steps, model.height, model.width)
        self.terms = config.surrogate().max_terms(model.num_steps).terms
        transformer: Any = self.backbone.load_transformer(model.torch_dtype)
        trainable.prepare(transformer, learners.lora, config.seed, self.backbone.lora_targets)
        if learners.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train().to(learners.device)
        self.engine: Engine = make_engine(transformer, learners, model.torch_dtype)
        self.buckets, self.packer = divide(self.engine.sizes(), learners.count), Packer()

    def step(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        cotangents: Sequence[Packed],
        factors: Sequence[float],
        shares: Sequence[float] = (),
    ) -> StepReport:
        """Sum one VJP per active node of this rank's items, then update.

        cotangents: dL/dtarget of each item, [rows, branches, ...] fp32. factors: what each row's cotangent is
        multiplied by: 1, or 0 for a masked row and batch / kept for the others. shares: where the rewards are
        balanced, what each one's is multiplied by; the cotangents are [terms, rows, branches, ...] then.
        """
        started = time.perf_counter()
        learners, optimizer = self.config.learners, self.config.learners.optimizer
        items = [r.item for r in rollouts]
        states = self._here(r.states for r in rollouts)
        pull, plans = self._pull(cotangents, shares), plans_of(items)
        scale = torch.tensor(factors, dtype=torch.float32, device=pull.device) * self.engine.scale
        pull = pull * append_dims(scale, pull.dim())
        base = _together([r.base for r in rollouts])
        watch = SweepObserver(items, self.sigmas, _together([r.velocities for r in rollouts]), base)
        with span("sweep"):
            swept = sweep(
                self._velocity(items),
                plans,
                states,
                pull,
                micro_batch=learners.micro_batch,
                fuse=learners.fuse,
                backward=self.engine.backward,
                terms_per_sample=self.terms,
                observe=watch,
                penalty=self._penalty(plans, base, scale),
            )
        backward_done = time.perf_counter()
        lr = optimizer.lr * lr_factor(optimizer.schedule, step, self.config.steps)
        with span("optimizer step"):
            norm = self.engine.step(lr)
        faults = tuple(watch.faults)
        if not math.isfinite(norm) and not faults:
            faults = self._bad_gradients(items, states, pull, self._penalty(plans, base, scale))
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
            drift=watch.drift(),
            moved=watch.moved(),
            faults=faults,
            timings={"sweep_s": backward_done - started, "optimizer_s": ended - backward_done},
        )

    @torch.no_grad()
    def drift(self, rollouts: Sequence[Rollout]) -> tuple[float, ...]:
        """The drift of each row, from a pass over the active nodes without gradient."""
        items = [r.item for r in rollouts]
        states = self._here(r.states for r in rollouts)
        watch = SweepObserver(items, self.sigmas, _together([r.velocities for r in rollouts]))
        velocity, places = self._velocity(items), torch.tensor(watch.places, device=states.device)
        # ZeRO-3 needs as many forwards on every rank as on the one with the most states: repeat the last one.
        most = len(plans_of(items)) * (self.terms + 1)
        padded = torch.arange(most, device=states.device).clamp(max=len(places) - 1)
        for part in padded.split(self.config.learners.micro_batch * self.config.learners.fuse):
            sample, node = places[part].unbind(1)
            watch(part, velocity(states[part], node, sample))
        return watch.drift()

    def _here(self, parts: Iterable[Packed]) -> Tensor:
        """The rows of all parts, one below the other, on this learner's device."""
        return torch.cat([unpack(part) for part in parts]).to(self.config.learners.device)

    def _pull(self, cotangents: Sequence[Packed], shares: Sequence[float]) -> Tensor:
        """The cotangents of all rows [rows, branches, ...]; of several terms the sum, each times its share."""
        if not shares:
            return self._here(cotangents)
        whole = torch.cat([unpack(part) for part in cotangents], dim=1).to(self.config.learners.device)
        return torch.tensordot(torch.tensor(shares, dtype=torch.float32, device=whole.device), whole, dims=1)

    def _velocity(self, items: Sequence[Item], module: nn.Module | None = None) -> Velocity:
        """The velocity that is differentiated, at the prompts of these items."""
        prompts = [prompt for item in items for prompt in item.prompt_ids]
        return trained_velocity(
            self.backbone,
            module or self.engine.module,
            self.sigmas,
            self.embeddings.rows(prompts),
            self.embeddings.negative(len(prompts)),
            items[0].guidance,
            self.config.backbone.detach_negative,
        )

    def _penalty(
        self, plans: Sequence[Plan], base: Tensor | None, scale: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The penalty's part of the cotangents, in the same unit as the reward's: per row times `scale`."""
        settings = self.config.learners.base_penalty
        if base is None or settings is None or settings.weight == 0:
            return None
        return base_penalty(plans, base, settings.weight * scale / self.config.data.shape.batch)

    def _bad_gradients(
        self,
        items: Sequence[Item],
        states: Tensor,
        pull: Tensor,
        penalty: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Fault, ...]:
        """After a norm that is not finite: which samples' gradients are to blame, one at a time. Nothing is kept."""
        if self.config.learners.engine == "deepspeed" and self.config.learners.zero == 3:
            return ()  # the parameters are apart; the driver names the step
        watch, velocity = SweepObserver(items, self.sigmas), self._velocity(items, self.engine.bare)
        parameters = list(trainable.trained(self.engine.bare).values())
        bad: dict[tuple[int, int], Fault] = {}
        for place, (b, node) in enumerate(watch.places):
            at = [torch.tensor([i], device=states.device) for i in (node, b)]
            v = velocity(states[place : place + 1], *at)
            cotangent = pull[b].sum(0)
            if penalty is not None:
                cotangent = cotangent + penalty(torch.tensor([place], device=states.device), v.detach())[0]
            found = torch.autograd.grad((v.float() * cotangent).sum(), parameters, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in found if g is not None])
            if not torch.isfinite(norm):  # the norm's squares may overflow where the values do not
                bad.setdefault((b, node), watch.fault("gradient", b, node))
        return tuple(bad.values())

    def publish(self, ema: bool = False) -> Iterator[Parcel]:
        """This rank's buckets of the trained weights (or of their average), for the samplers.

        All ranks go through all buckets. A parcel may be the weights' own memory: copy it before asking for the next.
        """
        for bucket, tensors in zip(self.buckets, self.engine.parts(self.buckets, ema), strict=True):
            if bucket.rank == self.rank:
                yield self.packer.parcel(tensors)

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        """This rank's part of the fingerprint of its fp32 masters, cast to what is published."""
        return self.engine.checksums(ema)

    def digest(self) -> str:
        """sha256 of the trained weights."""
        in_order = dict(sorted(self.engine.sizes().items()))
        return digest_of_parts(self.engine.parts(divide(in_order)))

    def save(self, folder: str) -> None:
        self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        self.engine.load(Path(folder))


def plans_of(items: Sequence[Item]) -> list[Plan]:
    return [plan for item in items for plan in item.plans]


def _together(parts: Sequence[Packed | None]) -> Tensor | None:
    """What the samplers sent beside the states [R, ...]; None where they were not asked for it."""
    there = [unpack(part) for part in parts if part is not None]
    return torch.cat(there) if there else None


def make_engine(module: nn.Module, config: LearnersConfig, dtype: torch.dtype) -> Engine:
    """The engine that `learners.engine` names."""
    if config.engine == "torch":
        return TorchEngine(module, config)
    from flowbp_ray.learning.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, config, dtype)
