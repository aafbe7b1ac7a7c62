"""What every section of a configuration is, and those of the processes that have one."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator


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


class EncoderConfig(ProcessConfig):
    """Encodes the prompts before anything else, and ends.

    cache: the folder of embeddings on disk that runs share, or null for none. auto: `embeddings` below
    $FLOWBP_RAY_CACHE, where that is set, else below flowbp_ray in $XDG_CACHE_HOME or ~/.cache.
    """

    cache: str | None = Field("auto", min_length=1)

    @field_validator("cache")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Relative to where the command runs: actors run elsewhere."""
        return value if value in (None, "auto") else str(Path(value).expanduser().absolute())
