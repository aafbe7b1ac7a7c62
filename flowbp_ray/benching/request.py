"""Which ratios the command line asks for and what they need, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils.errors import ConfigError

EMULATED_STORE = 2 * 2**30
"""Bytes of the object store of an emulation."""


def parse_numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Parse a list such as "1,2,4"; each number is kept once. Raises ConfigError for anything else.

    option: of the command line, for the message. least: the smallest number that is allowed.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no list of numbers; write for example {option} 1,2,4") from None
    if min(found) < least:
        raise ConfigError(f"{option} {text!r}: every number must be at least {least}")
    return list(dict.fromkeys(found))


def ratio_overrides(
    config: RunConfig, samplers: str | None, learners: str | None, rewards: str | None, staleness: str | None
) -> list[list[str]]:
    """The overrides of each ratio, in the order in which they are measured. What is None stays as configured."""
    asked = {
        "samplers.count": (samplers, "--samplers", 1, config.samplers.count),
        "learners.count": (learners, "--learners", 1, config.learners.count),
        "rewards.count": (rewards, "--rewards", 1, config.rewards.count),
        "staleness": (staleness, "--staleness", 0, config.staleness),
    }
    lists = {
        key: parse_numbers(text, name, least) if text else [now] for key, (text, name, least, now) in asked.items()
    }
    order = ("staleness", "learners.count", "rewards.count", "samplers.count")
    return [
        [f"{key}={value}" for key, value in zip(order, values, strict=True)]
        for values in product(*(lists[key] for key in order))
    ]


def resources_needed(configs: Sequence[RunConfig]) -> dict[str, int]:
    """What a node must have to hold all roles and the encoder of any one of `configs`: amounts by Ray's names."""
    most: dict[str, int] = {}
    for config in configs:
        needed = dict(config.encoder.bundle)
        for pool in (config.samplers, config.learners, config.rewards):
            for kind, amount in pool.bundle.items():
                needed[kind] = needed.get(kind, 0.0) + pool.count * amount
        most |= {kind: max(most.get(kind, 0), math.ceil(amount)) for kind, amount in needed.items()}
    return most


def emulated_ray(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """Options of `ray.init` for a private Ray that is told that it has all that the roles ask for."""
    needed = resources_needed(configs)
    cpus, gpus = needed.pop("CPU", 0) + 2, needed.pop("GPU", 0) + 1
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": needed, "object_store_memory": EMULATED_STORE}
