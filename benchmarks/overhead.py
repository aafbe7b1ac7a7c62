"""python -m benchmarks.overhead: what it costs to separate sampling, scoring and learning into processes.

The same steps of the embedded model three ways, in turn: one process on one core; the loop on Ray at staleness 0 (one
thread per role, so one is busy at a time); the loop on Ray at staleness 1, free to use two cores. CPU seconds count
every process, Ray's daemons and the driver included; the first steps do not count. Prints JSON with the medians.

cpu_ratio_s0: CPU per step, Ray at staleness 0 / one process. wall_ratio_s1: wall per step, Ray at staleness 1 / one
process. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from flowbp_ray import loading
from flowbp_ray.config import RunConfig
from flowbp_ray.driver import train
from flowbp_ray.local import LocalLoop
from flowbp_ray.progress import Progress

WARM = 3


class Clock(Progress):
    """Wall clock and CPU time of this process and its descendants after every step."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps, quiet=True)
        self.marks: list[tuple[float, float]] = []

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        self.marks.append((time.perf_counter(), cpu_of_all()))

    def per_step(self) -> tuple[float, float]:
        """(wall, CPU) seconds of the steps after the first WARM."""
        (wall, cpu), (end, total) = self.marks[WARM - 1], self.marks[-1]
        count = len(self.marks) - WARM
        return (end - wall) / count, (total - cpu) / count


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
    """A step of 32 images with Sparse at K = 4; one learner on plain torch, so that both sides do the same."""
    overrides = [
        f"output={output}",
        f"steps={steps}",
        f"staleness={staleness}",
        "samplers.count=2",
        "rewards.count=1",
        "rewards.monitors=[]",
        "learners.engine=torch",
        "learners.count=1",
        "data.rollout_batch=8",
        "evaluation.prompts=null",
    ]
    return loading.load("shapes_flowbp_sparse", overrides)


def alone(config: RunConfig) -> tuple[float, float]:
    """(wall, CPU) seconds per step in this process on one thread."""
    loop, clock = LocalLoop(config), Clock(config.steps)
    for step in range(config.steps):
        loop.step(step)
        clock.step(step + 1, {})
    return clock.per_step()


def on_ray(config: RunConfig) -> tuple[float, float]:
    clock = Clock(config.steps)
    train(config, clock)
    return clock.per_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=13)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            zero, one = (configure(Path(folder), options.steps, s) for s in (0, 1))
            values = {"alone": alone(zero), "ray_s0": on_ray(zero), "ray_s1": on_ray(one)}
        rows.append({name: {"wall_s": round(w, 3), "cpu_s": round(c, 3)} for name, (w, c) in values.items()})
    result = {
        "step": "32 images of the embedded model, Sparse K = 4, 16 sampling steps",
        "cores": psutil.cpu_count(),
        "pairs": rows,
        "cpu_ratio_s0": round(statistics.median(r["ray_s0"]["cpu_s"] / r["alone"]["cpu_s"] for r in rows), 3),
        "wall_ratio_s0": round(statistics.median(r["ray_s0"]["wall_s"] / r["alone"]["wall_s"] for r in rows), 3),
        "wall_ratio_s1": round(statistics.median(r["ray_s1"]["wall_s"] / r["alone"]["wall_s"] for r in rows), 3),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
