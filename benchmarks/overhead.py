"""python -m benchmarks.overhead: what it costs to separate sampling, scoring and learning into processes.

The same steps of the embedded model, in one process on one thread and on Ray with one thread per role, on an otherwise
idle machine. The first steps do not count. Prints JSON.

cpu_ratio_s0: CPU seconds of a step on Ray at staleness 0 (every process counts: actors, driver, daemons) over those of
    the step in one process, which the driver runs between the steps on Ray: neighbours in time, so that a machine whose
    speed drifts slows both. Median over the steps of all pairs of runs.
wall_ratio_s1: wall seconds of a step on Ray at staleness 1 with two samplers on two cores, over those in one process on
    one core, taken before and after that run. Median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import train
from flowbp_ray.local import LocalLoop
from flowbp_ray.observability.progress import Progress

WARM = 3


class Clock(Progress):
    """Wall clock and CPU time of this process and its descendants at the end of every step."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps, quiet=True)
        self.marks: list[tuple[float, float]] = []

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        self.marks.append((time.perf_counter(), cpu_of_all()))

    def wall(self) -> float:
        """Mean seconds of the steps after the first WARM."""
        return (self.marks[-1][0] - self.marks[WARM - 1][0]) / (len(self.marks) - WARM)


class Between(Clock):
    """After each step on Ray, while its actors idle, the same step in this process."""

    def __init__(self, steps: int, loop: LocalLoop) -> None:
        super().__init__(steps)
        self.loop = loop
        self.pairs: list[tuple[float, float]] = []  # CPU seconds (on Ray, here)

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        super().step(done, metrics)
        started = time.process_time()
        self.loop.step(done - 1)
        here = time.process_time() - started
        if done > WARM:
            self.pairs.append((self.marks[-1][1] - self.resumed, here))
        self.resumed = cpu_of_all()


def cpu_of_all() -> float:
    """CPU seconds of this process and all that descend from it."""
    me = psutil.Process()
    spent = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent += times.user + times.system
    return spent


def configure(output: Path, steps: int, staleness: int) -> RunConfig:
    """A step of 32 images with Sparse at K = 4; one learner on plain torch, so that both sides do the same.

    One sampler at staleness 0, two at 1, where the second uses the core that the learner leaves idle.
    """
    overrides = [
        f"output={output}",
        f"steps={steps}",
        f"staleness={staleness}",
        f"samplers.count={1 + staleness}",
        "rewards.count=1",
        "rewards.monitors=[]",
        "learners.engine=torch",
        "learners.count=1",
        "data.rollout_batch=8",
        "evaluation.prompts=null",
    ]
    return loading.load("shapes_flowbp_sparse", overrides)


def alone(loop: LocalLoop, steps: int) -> float:
    """Wall seconds per step in this process on one thread."""
    started = time.perf_counter()
    for step in range(steps):
        loop.step(step)
    return (time.perf_counter() - started) / steps


def pair(folder: Path, steps: int) -> dict[str, object]:
    """One pair of each kind."""
    zero, one = (configure(folder, steps, staleness) for staleness in (0, 1))
    between = Between(steps, LocalLoop(zero))
    train(zero, between)
    before, clock = alone(between.loop, 4), Clock(steps)
    train(one, clock)
    after = alone(between.loop, 4)
    return {
        "cpu_s": [(round(ray, 3), round(here, 3)) for ray, here in between.pairs],
        "wall_s": {"alone": round((before + after) / 2, 3), "ray_s1": round(clock.wall(), 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=13)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Any] = []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(pair(Path(folder), options.steps))
    cpu = [values for row in rows for values in row["cpu_s"]]
    result = {
        "step": "32 images of the embedded model, Sparse K = 4, 16 sampling steps",
        "cores": psutil.cpu_count(),
        "pairs": rows,
        "median_cpu_s": {name: statistics.median(v[i] for v in cpu) for i, name in enumerate(("ray_s0", "alone"))},
        "cpu_ratio_s0": round(statistics.median(ray / here for ray, here in cpu), 3),
        "wall_ratio_s1": round(statistics.median(r["wall_s"]["ray_s1"] / r["wall_s"]["alone"] for r in rows), 3),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
