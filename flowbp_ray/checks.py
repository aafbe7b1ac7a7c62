"""Everything that can be wrong before an actor starts: prompts, rewards, the model's folder, adapters, the cache."""

from __future__ import annotations

from dataclasses import dataclass

from flowbp_ray import prompts, weights
from flowbp_ray.config import RunConfig
from flowbp_ray.embedding_cache import cache_folder
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.rewards.base import check_name


@dataclass(frozen=True)
class Checked:
    """Training and evaluation prompts, and what is trained, in words."""

    training: list[PromptRecord]
    held_out: list[PromptRecord]
    trains: str


def check(config: RunConfig) -> Checked:
    """Read what the configuration names, without loading weights.

    Raises ValueError for what the user must change.
    """
    model, lora = config.backbone, config.learners.lora
    backbone = model.open()
    backbone.latent_shape(model.height, model.width)
    prepared = weights.prepare(backbone.skeleton(), lora, config.seed, backbone.lora_targets)
    train, held_out = read_prompts(config)
    for name in [t.name for t in config.rewards.terms] + config.rewards.monitors:
        check_name(name)
    cache_folder(config.encoder.cache)
    return Checked(train, held_out, weights.describe(prepared, lora))


def read_prompts(config: RunConfig) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """The training and the evaluation prompts: all that a run encodes."""
    train, held_out = prompts.load(config.data.prompts), config.evaluation.prompts
    return train, prompts.load(held_out)[: config.evaluation.limit] if held_out else []
