"""What `flowbp-ray plan` prints: a step's work, what every role needs, and whether a cluster has room for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning import show
from flowbp_ray.planning.advice import FitVerdict, check_fit
from flowbp_ray.planning.cluster import read_cluster
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.encoding import refusal
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.planning.reward_memory import unstated


def print_surrogate(config: RunConfig, step: int, console: Console) -> None:
    """Print the surrogate plans of a step."""
    console.print(show.planned(config, step, describe=True))


def print_plan(
    config: RunConfig,
    step: int,
    console: Console,
    gpus: str | None = None,
    host_memory: str | None = None,
    running: Sequence[Any] | None = None,
    as_json: bool = False,
) -> FitVerdict | None:
    """Print tables (or JSON) of what `config` needs; return whether it fits, or None where no cluster is given.

    Text encoders that would take too long do not fit anywhere.

    gpus, host_memory: as they are written, such as 8x80GB and 2TB. running: the nodes of a running Ray cluster.
    Raises ValueError for a size that is not understood.
    """
    cluster = read_cluster(gpus, host_memory, running)
    costs = Costs(config)
    found = forecast(config, costs)
    verdict = check_fit(config, cluster, costs) if cluster else None
    slow = refusal(config, found.encoding, found.sizes, cluster.smallest if cluster else None)
    if slow and (verdict is None or verdict.fits):
        verdict = FitVerdict(False, slow, {})
    if as_json:
        print(json.dumps(found.to_dict() | {"verdict": asdict(verdict) if verdict else None}, indent=1))
        return verdict
    console.print(show.planned(config, step, describe=False))
    for part in show.tables(found):
        Console(highlight=False, width=None if console.is_terminal else 100).print(part)
    console.print(show.NOTES)
    if found.pairs is not None:
        console.print(found.pairs.line)
    if missing := unstated(config, costs):
        console.print(f"not counted, since they do not say what they hold: the models of {', '.join(missing)}")
    if verdict is not None and verdict.fits:
        console.print(verdict.line)
    return verdict
