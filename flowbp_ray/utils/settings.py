"""What all parts of a configuration share: strictness, and what one actor or a pool of them takes."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flowbp_ray.utils import accelerator

MAX_CALLS_IN_FLIGHT = 2
"""Calls in flight per actor of a pool: one running, one waiting, so that no actor is idle until the driver answers."""

LOOKING = 0.1
"""The share of its time that the driver looks for answers: the more calls are in flight, the more rarely it looks."""


def switch_for_a_number(annotation: Any, value: Any) -> bool:
    """Whether `value` holds true or false where a field's annotation says a number, also inside lists and dicts."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, bool):
        if origin is Literal:
            return not any(isinstance(one, bool) for one in inner) and any(isinstance(one, int) for one in inner)
        if origin in (Union, UnionType):
            return bool not in inner and any(switch_for_a_number(one, value) for one in inner)
        return annotation in (int, float) or (origin is Annotated and switch_for_a_number(inner[0], value))
    if origin in (Union, UnionType, Annotated):
        return any(switch_for_a_number(one, value) for one in inner)
    if isinstance(value, list | tuple) and origin in (list, tuple, Sequence):
        return any(switch_for_a_number(inner[0], one) for one in value)
    if isinstance(value, dict) and origin in (dict, Mapping):
        return any(switch_for_a_number(inner[1], one) for one in value.values())
    return False


class Strict(BaseModel):
    """Unknown keys are refused; values cannot be changed after loading.

    The string below a field is its description: `flowbp-ray config-reference` and docs/configuration.md print it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """Refuse true and false where a number belongs, which Python would take for 1 and 0."""
        for key, value in data.items() if isinstance(data, dict) else ():
            if key in cls.model_fields and switch_for_a_number(cls.model_fields[key].annotation, value):
                raise ValueError(f"{key} must be a number, got {json.dumps(value, default=str)}; write a number")
        return data


class ProcessConfig(Strict):
    """One process, which is a Ray actor, and what it takes of its node."""

    threads: int = Field(1, ge=1)
    """CPU threads that torch computes with in each process."""
    cpus: float = Field(0.1, ge=0)
    """CPUs that Ray reserves for each process. It only decides where the process is placed, and limits nothing."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that Ray reserves for each process: a part of one, or a whole number. 0 computes on CPUs."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Amounts of further Ray resources that the node of each process must have. The names are those of
    `ray start --resources`, which tell groups of nodes apart, or one that Ray gives by itself, such as
    "accelerator_type:H100": 0.001. Above 1 an amount must be a whole number."""

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
        return accelerator.KIND if self.gpus else "cpu"


class PoolConfig(ProcessConfig):
    """A pool of identical processes."""

    count: int = Field(1, ge=1)
    """Number of processes in the pool when the run starts."""


class ElasticPoolConfig(PoolConfig):
    """A pool that may grow and shrink between two steps, from `min` to `max` processes.

    Results do not depend on its size. See `flowbp_ray.control.scaling`.
    """

    min: int | None = Field(None, ge=1)
    """Fewest processes that the pool may shrink to. null: it never shrinks below `count`."""
    max: int | None = Field(None, ge=1)
    """Most processes that the pool may grow to. null: it never grows above `count`."""

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
