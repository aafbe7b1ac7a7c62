"""Traces of a step's computations: a rollout's forward, a learner's node, a decoding, and what a reward computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from flowbp_ray.backbones import Backbone, Conditioning
from flowbp_ray.backbones.base import unit_images
from flowbp_ray.backbones.decoding import PLAIN, Decoding
from flowbp_ray.backbones.guidance import forward_guidance, full_velocity, one_branch, trained_velocity
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.trace import Cost, cost_of, fake_mode, held_by, hollow
from flowbp_ray.rewards.skeleton import Skeleton
from flowbp_ray.weights import trainable

T = TypeVar("T")


class Costs:
    """Traces of one model folder at one image size. Each is made once: advice asks for the same ones many times.

    Configurations of the same model may share one, whatever their methods, pools and batches.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raises ValueError where the folder holds no model of the family, or the image size is not possible."""
        model = config.backbone
        self.backbone: Backbone = backbone_named(model.name, model.path)
        self.latent_shape = self.backbone.latent_shape(model.height, model.width)
        self.known: dict[tuple[Any, ...], Any] = {}

    def transformer(self, config: RunConfig) -> nn.Module:
        """The transformer as learners and samplers prepare it, on the meta device."""
        lora = config.learners.lora
        return trainable.prepare(self.backbone.skeleton(), lora, config.seed, self.backbone.lora_targets)

    def rollout(self, config: RunConfig, rows: int, guidance: float) -> Cost:
        """A sampler's forward of `rows` images, without gradient; with a negative branch that is twice the rows."""
        key = ("rollout", str(config.learners.lora), rows, one_branch(self.backbone, guidance))
        return self.once(key, lambda: self._velocity(config, rows, guidance, False))

    def node(self, config: RunConfig) -> Cost:
        """A learner's largest forward and backward at the surrogate's nodes, the junction's gradient at x included."""
        junction = bool(config.surrogate().max_terms(config.backbone.num_steps).junction)
        model, learners, rows = config.backbone, config.learners, largest(config)
        attached = not (one_branch(self.backbone, model.guidance) or model.detach_negative)
        key = ("node", str(learners.lora), learners.gradient_checkpointing, rows, attached, junction)
        return self.once(key, lambda: self._velocity(config, rows, model.guidance, True, junction))

    def forward_node(self, config: RunConfig) -> Cost:
        """A learner's forward and backward at noised samples, for terms without gradient: of one branch."""
        learners, guidance = config.learners, forward_guidance(self.backbone, config.backbone.guidance)
        rows = learners.micro_batch * learners.fuse
        key = ("forward node", str(learners.lora), learners.gradient_checkpointing, rows)
        return self.once(key, lambda: self._velocity(config, rows, guidance, True))

    def decoding(self, rows: int, differentiate: bool, how: Decoding = PLAIN) -> Cost:
        """The decoder on `rows` latents; with the backward to the latents where asked."""

        def trace() -> Cost:
            with fake_mode():
                vae = how.lean(hollow(self.backbone.vae_skeleton().eval().requires_grad_(False), how.dtype))
                latents = torch.empty(rows, *self.latent_shape, requires_grad=differentiate)
                latents.grad = torch.empty_like(latents) if differentiate else None
                held = [*held_by(vae), latents, *([] if latents.grad is None else [latents.grad])]
                return cost_of(lambda: unit_images(self.backbone.decode(vae, latents).float()), held, differentiate)

        return self.once(("decoding", rows, differentiate, how), trace)

    def seeing(self, key: tuple[str, ...], reward: Skeleton, rows: int, differentiate: bool) -> int:
        """Peak bytes of a reward that scores `rows` images; with the backward to the pixels where asked.

        Traced for one image: with frozen weights nothing but maps of images is kept. key: tells the reward from others.
        """
        if reward.see is None:
            return reward.row * differentiate
        see, side = reward.see, reward.side

        def trace() -> int:
            copied = copy.deepcopy(reward.module)  # a trace leaves fake tensors in it
            with fake_mode():
                module = hollow(copied, reward.dtype)
                pixels = torch.empty(1, 3, side, side, dtype=reward.dtype, requires_grad=differentiate)
                held = [*module.parameters(), *module.buffers(), pixels]
                return cost_of(lambda: see(module, pixels), held, differentiate).peak

        return rows * self.once((*key, differentiate), trace)

    def once(self, key: tuple[Any, ...], find: Callable[[], T]) -> T:
        """The result of `find`, which is called only for a key that is new."""
        if key not in self.known:
            self.known[key] = find()
        found: T = self.known[key]
        return found

    def _velocity(self, config: RunConfig, rows: int, guidance: float, train: bool, junction: bool = False) -> Cost:
        model, learners = config.backbone, config.learners
        module: Any = self.transformer(config)
        if train and learners.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        module.train(train)
        with fake_mode():
            hollow(module, model.torch_dtype)
            cond, sigmas = self._conditioning(rows, model.torch_dtype), torch.empty(model.num_steps + 1)
            bound = (self.backbone, module, sigmas, cond, cond, guidance)
            velocity = trained_velocity(*bound, model.detach_negative) if train else full_velocity(*bound)
            x = torch.empty(rows, *self.latent_shape, dtype=model.torch_dtype, requires_grad=junction)
            node, row = torch.zeros(rows, dtype=torch.long), torch.arange(rows)
            held = [*(held_by(module) if train else module.parameters()), *module.buffers(), x, *cond.values()]
            return cost_of(lambda: velocity(x, node, row), held, train)

    def _conditioning(self, rows: int, dtype: torch.dtype) -> Conditioning:
        one = self.backbone.conditioning_skeleton()
        return {name: torch.empty(rows, *t.shape[1:], dtype=dtype) for name, t in one.items()}


def largest(config: RunConfig) -> int:
    """Rows of a learner's largest forward: micro_batch × fuse, or a junction's with the penalty's beside them."""
    learners = config.learners
    return learners.micro_batch * max(learners.fuse, 1 + penalised_junctions(config))


def noised_times(config: RunConfig) -> int:
    """Noised samples per image, each with a forward of the sampler and a node of the learner; see `surrogate.nft`."""
    return config.nft.times if config.rewards.scored else 0


def penalised_junctions(config: RunConfig) -> int:
    """Further rows per sample in a junction's forward: the base penalty's, whose gradient at x must not mix with it."""
    penalty = config.learners.base_penalty
    junction = config.surrogate().max_terms(config.backbone.num_steps).junction
    return int(junction and penalty is not None and penalty.weight > 0)


class Untraced(Costs):
    """The same model without activations: a lower bound of its memory, which needs no trace."""

    def __init__(self, costs: Costs) -> None:
        self.backbone, self.latent_shape = costs.backbone, costs.latent_shape
        self.known = {key: found for key, found in costs.known.items() if key[0] == "reward"}

    def rollout(self, config: RunConfig, rows: int, guidance: float) -> Cost:
        return Cost(0, 0, 0)

    def node(self, config: RunConfig) -> Cost:
        return Cost(0, 0, 0)

    def forward_node(self, config: RunConfig) -> Cost:
        return Cost(0, 0, 0)

    def decoding(self, rows: int, differentiate: bool, how: Decoding = PLAIN) -> Cost:
        return Cost(0, 0, 0)

    def seeing(self, key: tuple[str, ...], reward: Skeleton, rows: int, differentiate: bool) -> int:
        return 0
