"""Everything that can be wrong before an actor starts: prompts, rewards, the model's folder, adapters, the cache."""

from __future__ import annotations

from flowbp_ray import backbones, prompts, weights
from flowbp_ray.config import RunConfig
from flowbp_ray.embedding_cache import cache_folder
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.rewards.base import check_name


def check(config: RunConfig) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Read what the configuration names; returns the training and the evaluation prompts.

    Raises ValueError for what the user must change.
    """
    model, lora = config.backbone, config.learners.lora
    backbone = backbones.get(model.name, model.path)
    backbone.latent_shape(model.height, model.width)
    if lora is not None:
        weights.prepare(backbone.skeleton(), lora, config.seed, backbone.lora_targets)
    train, held_out = read_prompts(config)
    for name in [t.name for t in config.rewards.terms] + config.rewards.monitors:
        check_name(name)
    cache_folder(config.encoder.cache)
    return train, held_out


def read_prompts(config: RunConfig) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """The training and the evaluation prompts: all that a run encodes."""
    train, held_out = prompts.load(config.data.prompts), config.evaluation.prompts
    return train, prompts.load(held_out)[: config.evaluation.limit] if held_out else []
