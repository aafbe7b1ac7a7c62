"""Configurations of tiny models, and what a learner really allocates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.backbones.guidance import trained_velocity
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.weights import trainable

CLOSE = 0.15


def write(folder: Path, component: str, config: dict[str, Any]) -> None:
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    (folder / component).mkdir(parents=True, exist_ok=True)
    (folder / component / name).write_text(json.dumps(config))


def config_of(name: str, folder: Path, *overrides: str, method: str = "flowbp_bridge") -> RunConfig:
    small = ["backbone.dtype=float32", "backbone.height=64", "backbone.width=64", "evaluation.limit=2"]
    small += ["data.prompts_per_step=16", "data.rollout_batch=2", "learners.micro_batch=2"]
    small += ["samplers.count=8", "learners.count=8", "learners.zero=2", "rewards.count=2"]
    run = "sd35" if name == "qwen_image" else name
    return loading.load(f"{run}_{method}", [*small, f"backbone.name={name}", f"backbone.path={folder}", *overrides])


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator gave out above what there was, as PyTorch's profiler recorded it."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def real_node(config: RunConfig, module: Any) -> tuple[Callable[[], Tensor], nn.Module]:
    """A learner's forward on real tensors, gradients being there already; and what it trains."""
    backbone, model, learners = (
        backbone_named(config.backbone.name, config.backbone.path),
        config.backbone,
        config.learners,
    )
    trainable.prepare(module, learners.lora, 0, backbone.lora_targets)
    if learners.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    module.train()
    for p in trainable.trained(module).values():
        p.grad = torch.zeros_like(p)
    rows, dtype = learners.micro_batch * learners.fuse, model.torch_dtype
    cond = {k: torch.randn(rows, *t.shape[1:]).to(dtype) for k, t in backbone.conditioning_skeleton().items()}
    sigmas = torch.linspace(1, 0, model.num_steps + 1)
    velocity = trained_velocity(backbone, module, sigmas, cond, cond, model.guidance, model.detach_negative)
    x = torch.randn(rows, *backbone.latent_shape(model.height, model.width), dtype=dtype, requires_grad=True)
    x.grad = torch.zeros_like(x)
    return lambda: velocity(x, torch.zeros(rows, dtype=torch.long), torch.arange(rows)), module


def backward(forward: Callable[[], Tensor]) -> None:
    v = forward()
    (v.float() * torch.ones(v.shape)).sum().backward()
