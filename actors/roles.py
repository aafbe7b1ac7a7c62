"""Which classes a run's actors are of, and what each of them is given as its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowbp_ray.config.schema import RunConfig


@dataclass(frozen=True)
class Roles:
    """Remote classes. None: the real one. settings: what an actor's constructor (a learner's `build`) is given."""

    encoder: Any = None
    sampler: Any = None
    reward: Any = None
    learner: Any = None
    settings: Callable[[RunConfig], Any] = lambda config: config


REAL = Roles()
