"""Everything that can be wrong before an actor starts: prompts, rewards, the model's folder, adapters."""

from __future__ import annotations

from flowbp_ray import backbones, prompts, weights
from flowbp_ray.config import RunConfig
from flowbp_ray.rewards.base import check_name


def check(config: RunConfig) -> tuple[list[prompts.PromptRecord], list[prompts.PromptRecord]]:
    """Read what the configuration names; returns the training and the evaluation prompts.

    Raises ValueError for what the user must change.
    """
    model, lora = config.backbone, config.learners.lora
    backbone = backbones.get(model.name, model.path)
    backbone.latent_shape(model.height, model.width)
    if lora is not None:
        weights.prepare(backbone.skeleton(), lora, config.seed, backbone.lora_targets)
    train = prompts.load(config.data.prompts)
    held_out = prompts.load(config.evaluation.prompts)[: config.evaluation.limit] if config.evaluation.prompts else []
    for name in [t.name for t in config.rewards.terms] + config.rewards.monitors:
        check_name(name)
    return train, held_out
