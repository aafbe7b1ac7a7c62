"""A run whose pool of samplers grows and shrinks on a cluster that grows and shrinks with it; a process of its own.

python -m tests.deploy.autoscaled FOLDER, where RAY_ADDRESS is a cluster whose nodes for samplers have a `sampler` each.
Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray

from flowbp_ray import driver
from flowbp_ray.control import scaling
from flowbp_ray.driver import Loop
from tests.driver.chaos import before_step
from tests.small import small_config

MINUTES = 4


def settings(folder: Path) -> list[str]:
    room = ["samplers.min=1", "samplers.max=2", "samplers.resources.sampler=1", "cluster.placement_timeout=200"]
    return [f"output={folder}", *room, "steps=8", "data.rollout_batch=1", "name=autoscaled"]


def nodes() -> int:
    """Of samplers, alive."""
    return sum(1 for node in ray.nodes() if node["Alive"] and "sampler" in node["Resources"])


def until(count: int) -> None:
    """Wait for so many nodes of samplers."""
    end = time.monotonic() + 60 * MINUTES
    while nodes() != count:
        if time.monotonic() > end:
            raise TimeoutError(f"{nodes()} nodes of samplers and not {count} after {MINUTES} minutes")
        time.sleep(0.5)


def main() -> None:
    folder = Path(sys.argv[1])
    seen: list[int] = []

    def more(loop: Loop) -> None:
        seen.append(nodes())
        scaling.request(loop.run, {"samplers": 2})

    def there(loop: Loop) -> None:
        """The second node came because it was asked for, and its sampler is at work."""
        until(2)
        pool = loop.fleet.pipeline.samplers
        while pool.silent:
            pool.recover()
            time.sleep(0.2)
        seen.append(nodes())

    def fewer(loop: Loop) -> None:
        scaling.request(loop.run, {"samplers": 1})

    def gone(loop: Loop) -> None:
        until(1)
        seen.append(nodes())

    with before_step(1, more), before_step(2, there), before_step(4, fewer), before_step(6, gone):
        run, summary = driver.train(small_config(folder, "flowbp_sparse", *settings(folder)))
    counts = [line["count/samplers"] for line in run.metrics() if line["kind"] == "train"]
    print(json.dumps({"nodes": seen, "counts": counts, "digest": summary["weights_sha256"]}))


if __name__ == "__main__":
    main()
