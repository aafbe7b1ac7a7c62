"""A profile: how long each role of a run takes on a device, so that a machine without one can emulate it by waiting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.benching.emulation import Emulation
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import noised_times
from flowbp_ray.planning.work import based, sampled, swept
from flowbp_ray.utils.diff import differing
from flowbp_ray.utils.errors import ConfigError, nearest
from flowbp_ray.utils.settings import Strict

FORWARD_SHARE = 0.25  # of a checkpointed node (forward, forward again, twice a forward back) is one forward


class Profile(Strict):
    """Seconds per image of one process, seconds per byte, and bytes. source: how they were found, as text.

    made_for: the settings that a configuration must have for the numbers to hold (see `cost_settings`). model: the
    configuration files of the model's folder, by path in it, so that a run can be emulated without the model.
    """

    title: str
    source: str
    made_for: dict[str, Any]
    sampler_s: float = Field(gt=0)
    reward_s: float = Field(gt=0)
    learner_s: float = Field(gt=0)
    publish_s_per_byte: float = Field(ge=0)
    load_s_per_byte: float = Field(ge=0)
    update_bytes: int = Field(gt=0)
    prompt_bytes: int = Field(gt=0)
    latent: tuple[int, ...] = Field(min_length=1)
    itemsize: Literal[2, 4]
    model: dict[str, dict[str, Any]] = Field({})
    time_scale: float = Field(1.0, gt=0, le=1)
    bytes_scale: float = Field(1 / 64, gt=0, le=1)

    def scaled(self, time_scale: float | None, bytes_scale: float | None) -> Profile:
        """The profile with other factors; None keeps its own. Raises ConfigError for factors outside (0, 1]."""
        given = {"time_scale": time_scale, "bytes_scale": bytes_scale}
        return _validate({**self.model_dump(), **{k: v for k, v in given.items() if v is not None}}, self.title)

    def emulation(self, config: RunConfig) -> Emulation:
        """What the emulated actors of a run get. Raises ConfigError where the profile was made for other settings.

        The forwards of terms without gradient may be others: they are counted as rows like those of the profile.
        """
        made, here = ({k: v for k, v in of.items() if k != "nft"} for of in (self.made_for, cost_settings(config)))
        if different := list(differing(made, here)):
            key, old, new = different[0]
            raise ConfigError(
                f"profile {self.title!r} was computed with {key}={old}, this run has {new}; write {key}={old}, or make "
                "a profile of this run: python -m benchmarks.make_profile"
            )
        scale, trained = self.bytes_scale, [term.name for term in config.rewards.differentiable]
        sampler, learner, node = self._seconds(config)
        return Emulation(
            sampler_s=sampler * self.time_scale,
            reward_s=self.reward_s * self.time_scale,
            learner_s=learner * self.time_scale,
            node_s=node * self.time_scale,
            publish_s=self.publish_s_per_byte * self.update_bytes * self.time_scale,
            load_s=self.load_s_per_byte * self.update_bytes * self.time_scale,
            latent=self.latent,
            itemsize=self.itemsize,
            copies=len(trained) if config.rewards.balance != "none" else min(len(trained), 1),
            weight_bytes=max(8, int(self.update_bytes * scale)),
            prompt_bytes=max(8, int(self.prompt_bytes * scale)),
            rewards=tuple(trained),
            drift=config.drift.on,
            base=config.learners.base_penalty is not None,
            scored=tuple(term.name for term in config.rewards.scored),
        )

    def _seconds(self, config: RunConfig) -> tuple[float, float, float]:
        """Seconds per image of a sampler, of a learner, and of a pass over the surrogate's nodes without gradient."""
        batch, times, made = config.data.shape.batch, noised_times(config), self.made_for.get("nft", {"times": 0})
        more, learned = times - made["times"], swept(config)[1] / batch  # more: rows that the profile does not count
        sampler, learner = self.sampler_s, self.learner_s * (learned / (learned - more))
        if more:
            backbone = backbone_named(config.backbone.name, config.backbone.path)
            drawn, (forwards, rows) = sampled(config, backbone)[1] / batch, based(config, backbone)
            there = config.learners.base_penalty is not None and not config.rewards.differentiable
            sampler *= drawn / (drawn - more * (1 + there * forwards * rows))
        return sampler, learner, learner * (1 - times / learned) * FORWARD_SHARE

    def write_model(self, folder: Path) -> Path:
        """Write the model's folder with its configurations and no weights: the driver reads no more of it."""
        for name, content in self.model.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
        return folder


def cost_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what an image costs, nested as in the configuration."""
    plain = config.model_dump(mode="json")
    backbone = ("name", "height", "width", "num_steps", "guidance", "detach_negative", "dtype")
    learners = ("fuse", "gradient_checkpointing", "lora", "base_penalty")
    times = noised_times(config)
    return {
        "backbone": {key: plain["backbone"][key] for key in backbone},
        "method": plain["method"],
        "learners": {key: plain["learners"][key] for key in learners},
        **({"nft": {"times": times}} if times else {}),
    }


def load(name: str) -> Profile:
    """The profile in the file `name`, or the shipped one of that name. Raises ConfigError where there is none."""
    path = Path(name)
    found = path if path.is_file() else shipped() / Path(name).with_suffix(".json").name
    if not found.is_file():
        known = sorted(p.stem for p in shipped().glob("*.json"))
        raise ConfigError(f"{nearest(path.stem, known, 'profile')} (no file {name})")
    try:
        plain = json.loads(found.read_text())
    except ValueError as error:
        raise ConfigError(f"profile {name} is not JSON: {error}") from error
    return _validate(plain, name)


def _validate(plain: Any, name: str) -> Profile:
    """A profile of what JSON held. Raises ConfigError that names the first wrong key."""
    try:
        return Profile.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise ConfigError(f"profile {name}: {where}: {first['msg']}") from error


def shipped() -> Path:
    """The folder of the profiles that come with the package."""
    return loading.shipped() / "profiles"
