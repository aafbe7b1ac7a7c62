"""What a run's folder needs before the run begins or goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowbp_ray.artifacts.widen import widen
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.guard import clear_overruled_verdict
from flowbp_ray.run.folder import Run


def prepare(run: Run, config: RunConfig, texts: Sequence[str], note: Callable[[str], object]) -> None:
    """Check the guard's verdict and the prompts, `texts`, against the folder; merge adapters that are trained no more.

    note: takes a line that a person should know. Raises ConfigError where the run cannot go on.
    """
    clear_overruled_verdict(run, config.guard)
    run.bind_prompts(texts)
    widen(run, config, note)
