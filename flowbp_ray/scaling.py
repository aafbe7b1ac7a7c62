"""How many samplers and reward servers a run has between two steps: by hand (`flowbp-ray scale`) and by rule.

The rule looks at the last steps. A role's busy share is its seconds of work over count · step seconds.
- The learners waited more than WAITS of the time: one more of the busier role.
- A role idles more than IDLES of the time, and would still not be full with one fewer: one fewer.
It holds still for WINDOW steps after a change, so that it sees what the change did. Results do not depend on any of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from flowbp_ray.config import RunConfig
from flowbp_ray.loading import ConfigError
from flowbp_ray.run import Run

FILE = "scale.json"
ROLES = {"samplers": "sampler_s", "rewards": "reward_s"}
"""Role -> the metric with its seconds of work, summed over its processes."""
WINDOW = 5  # steps
WAITS = 0.10
IDLES = 0.20
FULL = 0.95  # busier than this nobody is made by taking one away

Counts = Mapping[str, int]  # role -> processes


def rule(config: RunConfig, counts: Counts, steps: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """The new size of the role that should change; empty where none should. steps: metrics since the last change."""
    if len(steps) < WINDOW:
        return {}
    seconds = sum(step["step_s"] for step in steps[-WINDOW:])
    busy = {role: sum(step[key] for step in steps[-WINDOW:]) / (counts[role] * seconds) for role, key in ROLES.items()}
    bounds = {role: getattr(config, role).bounds for role in ROLES}
    if sum(step["wait_s"] for step in steps[-WINDOW:]) > WAITS * seconds:
        role = max(busy, key=lambda name: busy[name])
        return {role: counts[role] + 1} if counts[role] < bounds[role][1] else {}
    for role, share in busy.items():
        fewer = counts[role] - 1
        if fewer >= bounds[role][0] and share < 1 - IDLES and share * counts[role] / fewer <= FULL:
            return {role: fewer}
    return {}


def parse(config: RunConfig, sizes: Sequence[str]) -> dict[str, int]:
    """`samplers=6` and the like as role -> size. Raises ConfigError for what is not understood or beyond the bounds."""
    found = {}
    for text in sizes:
        role, _, number = text.partition("=")
        if role not in ROLES or not number.isdigit():
            raise ConfigError(f"{text!r} is not understood; write samplers=6 or rewards=2")
        least, most = getattr(config, role).bounds
        if not least <= int(number) <= most:
            raise ConfigError(
                f"{role}={number} is beyond {role}.min={least} and {role}.max={most}, with which the run was started"
            )
        found[role] = int(number)
    if not found:
        raise ConfigError("no size given; write samplers=6 or rewards=2")
    return found


def ask(run: Run, sizes: Counts) -> None:
    """Leave the wish where the run looks between two steps. Sizes that were asked for before and not taken stay."""
    wished = {**peek(run), **sizes}
    partial = run.folder / f"{FILE}.{os.getpid()}"
    partial.write_text(json.dumps(wished) + "\n")
    partial.rename(run.folder / FILE)


def peek(run: Run) -> dict[str, int]:
    """What is asked for and not taken yet."""
    try:
        wished = json.loads((run.folder / FILE).read_text())
        return {role: int(size) for role, size in wished.items() if role in ROLES}
    except (OSError, ValueError, AttributeError):
        return {}


def take(run: Run) -> dict[str, int]:
    """What is asked for; it is not asked for any more."""
    wished = peek(run)
    if wished:
        (run.folder / FILE).unlink(missing_ok=True)
    return wished
