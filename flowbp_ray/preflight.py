"""Everything that can be wrong before an actor starts: prompts, rewards, the model's folder, adapters, the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.judges import preflight as judges
from flowbp_ray.prompts import PromptRecord, read_prompts
from flowbp_ray.rewards.remote import handshake
from flowbp_ray.rewards.scorer import check_rewards
from flowbp_ray.utils.files import cache_folder, cached_file_fact
from flowbp_ray.weights import trainable


@dataclass(frozen=True)
class Checked:
    """Training and evaluation prompts, and what is trained, in words. agreed: see `handshake.check`."""

    training: list[PromptRecord]
    held_out: list[PromptRecord]
    trains: str
    agreed: dict[str, str]

    @property
    def texts(self) -> list[str]:
        """All prompts in the order of their ids: those for training, then those of evaluations."""
        return [record.text for record in (*self.training, *self.held_out)]


def check(config: RunConfig) -> Checked:
    """Read what the configuration names; of the weights only whether they are finite.

    Raises ValueError for what the user must change.
    """
    model, lora = config.backbone, config.learners.lora
    backbone = build_backbone(model)
    backbone.latent_shape(model.height, model.width)
    prepared = trainable.prepare(backbone.skeleton(), lora, config.seed, backbone.lora_targets)
    train, held_out = read_prompts(config)
    agreed = handshake.check(config)
    if not config.rewards.url:  # whose servers have checked their own
        check_rewards(config.rewards, [record.text for record in held_out])
    judges.check(config.judges)
    cache = cache_folder(config.encoder.cache)
    for part in (backbone.base_folder / "transformer", backbone.base_folder / "vae", *backbone.encoder_parts()):
        _check_weights(part, None if cache is None else cache / "files")
    return Checked(train, held_out, trainable.describe(prepared, lora), agreed)


def _check_weights(part: Path, memory: Path | None) -> None:
    """Raises ValueError where a weight of a component is not finite, or its file cannot be read.

    memory: where it is noted that a large file was read. Variants (`*.fp16.safetensors`) are not loaded, nor looked at.
    """
    for file in sorted(part.glob("*.safetensors")):
        if "." not in file.stem:
            cached_file_fact(file, memory, "finite", _finite)


def _finite(file: Path) -> str:
    """Return "finite" where all values of a safetensors file are finite. Raises ValueError otherwise."""
    broken = f"{file.parent.parent} has a broken {file.parent.name}"
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{broken}: {name} has values that are not finite")
    except SafetensorError as error:
        raise ValueError(f"{broken}: its weights cannot be read ({error})") from error
    return "finite"
