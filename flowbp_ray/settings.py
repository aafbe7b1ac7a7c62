"""What all parts of a configuration share: strictness, and what one actor or a pool of them takes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Unknown keys are refused; values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProcessConfig(Strict):
    """One actor. cpus and gpus are Ray's logical resources; threads are torch's."""

    threads: int = Field(1, ge=1)
    cpus: float = Field(0.1, ge=0)
    gpus: float = Field(0.0, ge=0)

    @property
    def device(self) -> str:
        """Where an actor of the pool computes: on the GPU that Ray gives it, if it asks for one."""
        return "cuda" if self.gpus else "cpu"


class PoolConfig(ProcessConfig):
    """A pool of identical actors."""

    count: int = Field(1, ge=1)


class ElasticPoolConfig(PoolConfig):
    """A pool that may grow and shrink between steps, within min and max; where they are not written it stays at count.

    Results do not depend on it. See `flowbp_ray.scaling`.
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
        if not least <= self.count <= most:
            raise ValueError(
                f"count={self.count} must lie between min={least} and max={most}; write min <= count <= max"
            )
        return self
