"""Everything that can be wrong before an actor starts: prompts, rewards, the model's folder, adapters."""

from __future__ import annotations

from dataclasses import dataclass

from flowbp_ray import backbones, prompts, weights
from flowbp_ray.config import RunConfig
from flowbp_ray.rewards.base import check_name


@dataclass(frozen=True)
class Checked:
    """Training and evaluation prompts, and what is trained, in words."""

    training: list[prompts.PromptRecord]
    held_out: list[prompts.PromptRecord]
    trains: str


def check(config: RunConfig) -> Checked:
    """Read what the configuration names, without loading weights.

    Raises ValueError for what the user must change.
    """
    model, lora = config.backbone, config.learners.lora
    backbone = backbones.get(model.name, model.path)
    backbone.latent_shape(model.height, model.width)
    prepared = weights.prepare(backbone.skeleton(), lora, config.seed, backbone.lora_targets)
    train = prompts.load(config.data.prompts)
    held_out = prompts.load(config.evaluation.prompts)[: config.evaluation.limit] if config.evaluation.prompts else []
    for name in [t.name for t in config.rewards.terms] + config.rewards.monitors:
        check_name(name)
    return Checked(train, held_out, weights.describe(prepared, lora))
