"""What all parts of a configuration share: strictness, and what one actor or a pool of them takes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_CALLS_IN_FLIGHT = 2
"""Calls in flight per actor of a pool: one running, one waiting, so that no actor is idle until the driver answers."""


class Strict(BaseModel):
    """Unknown keys are refused; values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProcessConfig(Strict):
    """One actor. cpus and gpus are Ray's logical resources; threads are torch's.

    resources: others that its node must have, as `ray start --resources` names them, to tell groups of nodes apart; or
    "accelerator_type:H100": 0.001, which Ray names by itself.
    """

    threads: int = Field(1, ge=1)
    cpus: float = Field(0.1, ge=0)
    gpus: float = Field(0.0, ge=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field({})

    @field_validator("resources")
    @classmethod
    def _others(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name.upper() in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY") or not name:
                raise ValueError(f"resources names {name!r}; write cpus or gpus, and here only what Ray does not count")
            if amount > 1 and not amount.is_integer():
                raise ValueError(f"resources.{name}={amount:g}: Ray wants whole numbers above 1; write {int(amount)}")
        return value

    @property
    def bundle(self) -> dict[str, float]:
        """All that Ray reserves for it, by Ray's names."""
        own = {kind: amount for kind, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}
        return own | self.resources

    @property
    def device(self) -> str:
        """Where an actor of the pool computes: on the GPU that Ray gives it, if it asks for one."""
        return "cuda" if self.gpus else "cpu"


class PoolConfig(ProcessConfig):
    """A pool of identical actors."""

    count: int = Field(1, ge=1)


class ElasticPoolConfig(PoolConfig):
    """A pool that may grow and shrink between steps, within min and max; where they are not written it stays at count.

    Results do not depend on it. See `flowbp_ray.control.scaling`.
    """

    min: int | None = Field(None, ge=1)
    max: int | None = Field(None, ge=1)

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most actors."""
        return self.min or self.count, self.max or self.count

    @model_validator(mode="after")
    def _ordered(self) -> ElasticPoolConfig:
        least, most = self.bounds
        if self.min and self.max and self.min > self.max:
            raise ValueError(f"min={least} is above max={most}; write min <= max")
        if not least <= self.count <= most:
            side = f"below min={least}" if self.count < least else f"above max={most}"
            raise ValueError(f"count={self.count} is {side}; write min <= count <= max")
        return self
