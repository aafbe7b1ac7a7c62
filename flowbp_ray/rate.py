"""Learning-rate schedules as a function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from flowbp_ray.config.sections import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What the base rate is multiplied by in `step` (from 0) of a run of `steps` optimizer steps.

    Warm-up: (step + 1) / warmup, linear. After it, with t in [0, 1] over the steps that are left: constant 1;
    linear 1 − (1 − end)·t; cosine end + (1 − end)·(1 + cos(pi·t)) / 2 (arXiv 1608.03983, without restarts).
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    t = (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup)
    falling = 1.0 - t if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * t))
    return schedule.end + (1.0 - schedule.end) * falling
