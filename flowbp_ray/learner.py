"""One optimizer step from cached states and cotangents. Knows no method: only the plans that the items carry."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowbp_ray import backbones, weights
from flowbp_ray.backbones import Embeddings
from flowbp_ray.backbones.guidance import trained_velocity
from flowbp_ray.config import RunConfig
from flowbp_ray.engine import Engine, make_engine
from flowbp_ray.messages import Packed, Rollout, StepReport, pack_all, unpack
from flowbp_ray.surrogate.backward import sweep


class Learner:
    """One rank: the transformer, its engine, the prompt embeddings.

    No decoder, no reward, and where the negative branch is detached not that either.
    """

    def __init__(self, config: RunConfig, embeddings: Embeddings, rank: int = 0) -> None:
        model, learners = config.backbone, config.learners
        self.config, self.rank, self.embeddings = config, rank, embeddings
        self.backbone = backbones.get(model.name, model.path)
        self.sigmas = self.backbone.sigmas(model.num_steps, model.height, model.width)
        self.terms = config.surrogate().max_terms(model.num_steps).terms
        transformer: Any = self.backbone.load_transformer(model.torch_dtype)
        weights.prepare(transformer, learners.lora, config.seed)
        if learners.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        self.engine: Engine = make_engine(transformer, learners, model.torch_dtype)

    def step(
        self, step: int, rollouts: Sequence[Rollout], cotangents: Sequence[Packed], factor: float = 1.0
    ) -> StepReport:
        """Sum one VJP per active node of this rank's items, then update.

        cotangents: dL/dtarget of each item, [rows, branches, ...] fp32. factor: B/kept where samples were masked.
        """
        started = time.perf_counter()
        items = [r.item for r in rollouts]
        plans = [plan for item in items for plan in item.plans]
        states = torch.cat([unpack(r.states) for r in rollouts])
        pull = torch.cat([unpack(c) for c in cotangents]) * (factor * self.engine.scale)
        rows = [prompt for item in items for prompt in item.prompt_ids]
        velocity = trained_velocity(
            self.backbone,
            self.engine.module,
            self.sigmas,
            self.embeddings.rows(rows),
            self.embeddings.negative(len(rows)),
            items[0].guidance,
            self.config.backbone.detach_negative,
        )
        learners = self.config.learners
        swept = sweep(
            velocity,
            plans,
            states,
            pull,
            micro_batch=learners.micro_batch,
            fuse=learners.fuse,
            backward=self.engine.backward,
            terms_per_sample=self.terms,
        )
        backward_done = time.perf_counter()
        norm = self.engine.step()
        ended = time.perf_counter()
        return StepReport(
            step=step,
            rank=self.rank,
            grad_norm=norm,
            learning_rate=learners.optimizer.lr,
            forwards=swept.forwards,
            rows=swept.rows,
            padding=swept.padding,
            seconds=ended - started,
            timings={"sweep_s": backward_done - started, "optimizer_s": ended - backward_done},
        )

    def publish(self) -> dict[str, Packed] | None:
        """The trained weights for the samplers; all ranks call it, rank 0 answers."""
        tensors = self.engine.weights()
        return pack_all(tensors) if self.rank == 0 else None

    def digest(self) -> str:
        """sha256 of the trained weights."""
        return weights.digest(self.engine.weights())

    def save(self, folder: str) -> None:
        self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        self.engine.load(Path(folder))
