"""The rewards' part of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flowbp_ray.utils import addresses
from flowbp_ray.utils.settings import ElasticPoolConfig, Strict


class RewardConfig(Strict):
    """A reward, or what is only measured like one. kind: the entry of `rewards.REWARDS`, where `name` is your own.

    options: what its factory takes, such as the path of its weights; docs/rewards.md lists them.
    """

    name: str
    kind: str | None = None
    options: dict[str, Any] = Field({})

    @property
    def factory(self) -> str:
        """What `rewards.build` finds it by."""
        return self.kind or self.name


class TermConfig(RewardConfig):
    """One summand of the loss: weight · scale · relu(clip − r)."""

    weight: float = 1.0
    clip: float = 1.0
    scale: float = 1.0


class JitterConfig(Strict):
    """Noise (standard deviation up to this) and shifts (pixels, up to this) on what a reward sees in training."""

    noise: float = Field(0.0, ge=0)
    shift: int = Field(0, ge=0)


class RewardsConfig(ElasticPoolConfig):
    """terms are trained on; monitors are only measured, in evaluations.

    balance: grad_norm gives each term the share of the gradient that its weight says, whatever its unit (see
    `rewards.balance`); it costs a cotangent and a walk back through the decoder per term. url: of `flowbp-ray
    serve-reward`, one or several, which score in place of this cluster: actor i asks url i mod n. token_file: holds
    their token, where $FLOWBP_RAY_REWARD_TOKEN does not (docs/remote-rewards.md).
    """

    terms: list[TermConfig] = Field(min_length=1)
    monitors: list[RewardConfig] = Field([])
    balance: Literal["none", "grad_norm"] = "none"
    jitter: JitterConfig = JitterConfig()
    micro_batch: int | None = Field(None, ge=1)
    url: Annotated[list[str], Field(min_length=1)] | None = None
    token_file: str | None = Field(None, min_length=1)

    _url = field_validator("url", mode="before")(addresses.parse_urls)
    _token_file = field_validator("token_file")(addresses.absolute)

    @field_validator("balance", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """On the command line none is null, for all keys."""
        return "none" if value is None else value

    @field_validator("monitors", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A monitor without options may be written as its name alone."""
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @property
    def all(self) -> list[RewardConfig]:
        """Terms, then monitors."""
        return [*self.terms, *self.monitors]

    @model_validator(mode="after")
    def _distinct(self) -> RewardsConfig:
        names = [reward.name for reward in self.all]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is named twice among terms and monitors; write it once")
        return self
