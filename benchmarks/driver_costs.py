"""python -m benchmarks.driver_costs: CPU seconds of the driver's thread per item, by how many calls are in flight.

The real pipeline on a real Ray. Pools of N samplers and N/4 reward servers are N handles of a few emulated actors that
wait for nothing and send messages of a few bytes, so that what is measured is the driver alone: its CPU, not the clock.
Least squares: CPU of a batch = item · items + scan · (calls in flight, summed over the looks); a look, one `_pump` of
the pipeline, takes all answers that are there. With --bench, results of `flowbp-ray bench` at different numbers of
learners and of items, the costs of a step, of a rank and of an item are those of their steps instead: there answers
come one at a time, and an item costs more.
Prints JSON; --out writes the costs for `flowbp-ray bench --simulate`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from scipy.optimize import nnls

from actors import emulated
from actors.cluster import start_ray
from actors.pipeline import Pipeline
from actors.pool import Pool
from actors.transport import Published
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.benching.emulation import Emulation
from flowbp_ray.benching.simulate import DriverCosts
from flowbp_ray.config import loading
from flowbp_ray.messages import Item, Packed, Version
from flowbp_ray.rollout.items import ItemSource
from flowbp_ray.utils.checksums import combine

ALONE = ["learners.engine=torch", "learners.count=1", "learners.micro_batch=2"]
NOTHING = Emulation(0, 0, 0, 0, 0, 0, (1,), 2, 1, 8, 8, ("reward",), False, False)


class Counting(Pipeline):
    """Counts its looks and sums the calls in flight at each: what `SimulatedLoop.settle` pays `scan` for."""

    looks = scanned = 0

    def _pump(self) -> bool:
        self.looks += 1
        self.scanned += sum(job.pending is not None for job in self.jobs)
        return super()._pump()


class AllEncoded:
    """Stands for `actors.encoding.Encoding` once every prompt is encoded, all in one part."""

    complete, pending = True, ()

    def __init__(self, part: Any = None) -> None:
        self.part = part

    def check(self) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def has(self, prompt_ids: Sequence[int], step: int = -1) -> bool:
        return True

    def refs(self, prompt_ids: Sequence[int]) -> list[Any]:
        return [self.part]


def batch_of(items: int, step: int) -> list[Item]:
    """Items of two images of Sparse at K = 4."""
    config = loading.load(
        "shapes_flowbp_sparse", [f"data.prompts_per_step={2 * items}", "data.rollout_batch=2", *ALONE]
    )
    model, version = config.backbone, Version(0, 0)
    sigmas = build_backbone(model).sigmas(model.num_steps, model.height, model.width)
    return ItemSource(config.data, config.surrogate(), sigmas, 64, 1.0, 1, config.plan_seed).of_step(step, version)


def measure(samplers: int, actors: tuple[list[Any], list[Any]], rounds: int) -> list[dict[str, float]]:
    """One batch of two items per sampler, `rounds` times after one that does not count."""
    encoding: Any = AllEncoded(ray.put(Packed(np.zeros(8, np.uint8), "uint8")))
    weights = {"weights": Packed(np.zeros(4, np.uint16), "bfloat16")}
    pools = [
        Pool(name, [handles[i % len(handles)] for i in range(count)])
        for name, handles, count in zip(("s", "r"), actors, (samplers, max(1, samplers // 4)), strict=True)
    ]
    published = Published(Version(0, 0), [ray.put(weights)], known=combine([emulated.parts(weights)]))
    pipeline, rows = Counting(pools[0], pools[1], encoding, ["a prompt"] * 64, 1, 600.0), []
    for step in range(rounds + 1):
        items, pipeline.looks, pipeline.scanned = batch_of(2 * samplers, step), 0, 0
        clock, wall = time.thread_time(), time.perf_counter()
        pipeline.submit(items, published)
        pipeline.collect(step)
        spent = time.thread_time() - clock
        rows.append(
            {"samplers": samplers, "items": len(items), "looks": pipeline.looks, "scanned": pipeline.scanned}
            | {"cpu_s": spent, "wall_s": time.perf_counter() - wall}
        )
    return rows[1:]


def of_steps(points: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """(step, rank, item): what measured steps took of the driver's thread, by learners and items; relative errors."""
    spent = np.array([p["driver_thread_s"] for p in points])
    table = np.array([[1.0, p["ratio"]["learners"], p["items"]] for p in points]) / spent[:, None]
    step, rank, item = nnls(table, np.ones(len(points)))[0].tolist()
    return step, rank, item


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bench", type=Path, nargs="+", default=[], help="bench.json of emulated runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start_ray("local")
    actors = (
        [emulated.RemoteSampler.options(num_cpus=0.1).remote(NOTHING) for _ in range(2)],
        [emulated.RemoteReward.options(num_cpus=0.1).remote(NOTHING)],
    )
    ray.get([actor.ready.remote() for pool in actors for actor in pool])
    rows = [row for count in options.samplers for row in measure(count, actors, options.rounds)]
    ray.shutdown()
    # relative errors, so that the large batches do not decide everything
    scale = np.array([row["cpu_s"] for row in rows])
    table = np.array([[row["items"], row["scanned"]] for row in rows]) / scale[:, None]
    (item, scan), *_ = np.linalg.lstsq(table, np.ones(len(rows)), rcond=None)
    points = [p for file in options.bench for p in json.loads(file.read_text())["points"]]
    source = f"benchmarks.driver_costs, {options.samplers} samplers, {len(points)} benches, {psutil.cpu_count()} cores"
    step, rank, item = of_steps(points) if points else (0.0, 0.0, item)
    costs = DriverCosts(source=source, item=float(item), scan=max(0.0, float(scan)), step=step, rank=rank)
    if options.out:
        options.out.write_text(json.dumps(costs.model_dump(), indent=1) + "\n")
    print(json.dumps({"rows": rows, "costs": costs.model_dump()}, indent=1))


if __name__ == "__main__":
    main()
