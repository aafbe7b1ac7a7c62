"""python -m benchmarks.driver_costs: CPU seconds of the driver's thread in a step, by what there is of everything.

The run's own loop on a real Ray. The pools have N samplers, reward servers and learners that are handles of a few
emulated actors. These wait for nothing, and their messages lie in the object store as true ones do, so that what is
measured is the driver alone: its CPU, not the clock. Steps of different sizes, with and without a pause before each
look for answers, are fitted by least squares, none of the costs below zero; `scan` is measured by itself:

    CPU of a step = step + rank · learners + item · items + row · images + look · looks + scan · (references looked at)

With --bench, results of `flowbp-ray bench --emulate` are measurements too: there the driver sleeps between the answers,
and finds its caches cold. Prints JSON; --out writes the costs for `flowbp-ray bench --simulate`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from scipy.optimize import nnls

from actors import emulated
from actors.cluster import start_ray
from actors.elastic_pool import ElasticPool
from actors.encoding import Encoding
from actors.fleet import Fleet
from actors.judges import Judges
from actors.learner_group import LearnerGroup
from actors.pipeline import Job, Pipeline
from actors.pool import Pool
from actors.process import Roles
from actors.queue_stats import QueueStats
from flowbp_ray.benching.emulation import Emulation
from flowbp_ray.benching.points import Ratio
from flowbp_ray.benching.simulate import DriverCosts
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import Loop
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.observability.progress import Progress
from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.prompts import Needs
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.signals import Interrupts

ELEMENTS = 65536  # of an item's targets: in bf16 more than the 100 KiB that Ray sends within a call
PROMPTS = 12  # steps until a prompt comes again: those that follow one another were encoded together, as in a true run
COLUMNS = ("step", "rank", "item", "row", "look", "scan")
Actors = tuple[list[Any], list[Any], list[Any]]  # samplers, reward servers, learners


@dataclass(frozen=True)
class Size:
    """What a step consists of. images: of an item. pause: seconds before each look for answers."""

    samplers: int
    learners: int
    items: int
    images: int
    pause: float = 0.0

    @property
    def rewards(self) -> int:
        """Reward servers."""
        return max(1, self.samplers // 6)


@dataclass(frozen=True)
class Spent:
    """What a step took of the driver: looks for answers, references that they looked at, CPU of its thread, seconds."""

    looks: float
    looked_at: float
    thread_s: float
    process_s: float
    wall_s: float


SIZES = (
    Size(4, 1, 8, 4),
    *(Size(64, 16, 128, images, pause) for images, pause in ((4, 0.0), (4, 0.02), (16, 0.02))),
    Size(64, 64, 64, 4, 0.02),
    Size(256, 64, 256, 4, 0.05),
    Size(256, 128, 256, 16, 0.05),
)


class Handles(ElasticPool):
    """A pool that neither starts nor ends its actors."""

    def __init__(self, name: str, handles: Sequence[Any]) -> None:
        Pool.__init__(self, name, handles)
        self.waiting = {}

    def stop(self) -> None:
        pass


class Repeated(Fleet):
    """A fleet of `size`, whose actors are the same few."""

    def __init__(self, config: RunConfig, size: Size, actors: Actors, roles: Roles) -> None:
        self.size, self.actors = size, actors
        self.pause = 0.0
        super().__init__(config, [f"prompt {i}" for i in range(PROMPTS * config.data.prompts_per_step)], roles=roles)

    def _start(self, config: RunConfig, prompts: list[str], needs: Needs) -> None:
        samplers, rewards, (first, other) = self.actors
        handles = {
            name: [some[i % len(some)] for i in range(count)]
            for name, some, count in (
                ("sampler", samplers, self.size.samplers),
                ("reward server", rewards, self.size.rewards),
            )
        }
        self.encoding = self._encoding = Encoding(config, prompts, needs, self.roles, self.notify)
        self.encoding.finish()
        self.learners = LearnerGroup(config, self.roles, self.notify, self._wait, self.encoding.await_refs, shares=True)
        self.learners.ranks = [first, *[other] * (self.size.learners - 1)]
        self.queues = QueueStats(self.notify)
        self.pools = {key: Handles(*item) for key, item in zip(("samplers", "rewards"), handles.items(), strict=True)}
        self.pipeline = self._pipeline = Pipeline(
            *self.pools.values(), self.encoding, prompts, 1, 600.0, False, self.rest
        )

    def rest(self, pipeline: Pipeline, wanted: Sequence[Job]) -> None:
        """What is called before each look."""
        self.queues.observe(pipeline, wanted)
        if self.pause:
            time.sleep(self.pause)


def nothing(size: Size) -> Emulation:
    """Actors that wait for nothing."""
    latent = (ELEMENTS // size.images,)
    return Emulation(0, 0, 0, 0, 0, 0, latent, 2, 1, 8, 8, ("reward",), False, False)


def started(size: Size) -> Actors:
    """Two samplers, a reward server and two learners."""
    given = nothing(size)
    samplers = [emulated.RemoteSampler.options(num_cpus=0.1).remote(given) for _ in range(2)]
    rewards = [emulated.RemoteReward.options(num_cpus=0.1).remote(given)]
    learners = [emulated.RemoteLearner.options(num_cpus=0.1).remote() for _ in range(2)]
    ray.get([actor.ready.remote() for actor in (*samplers, *rewards)])
    ray.get([learner.build.remote(given, rank, "", 0) for rank, learner in enumerate(learners)])
    return samplers, rewards, learners


def config_of(size: Size, folder: str) -> RunConfig:
    """A run of the embedded model's configuration with Sparse at K = 4, and no evaluation."""
    batch = size.items * size.images
    overrides = [
        f"data.prompts_per_step={batch}",
        f"data.rollout_batch={size.images}",
        f"learners.count={size.learners}",
    ]
    overrides += [f"samplers.count={size.samplers}", f"rewards.count={size.rewards}", "learners.micro_batch=1"]
    overrides += [f"output={folder}", "evaluation.prompts=null", "guard=null", "judges=[]", "checkpoint.every=0"]
    overrides += ["encoder.cache=null", "encoder.ahead=1", "tracking.wandb=false", "steps=100000", "staleness=1"]
    return loading.load("shapes_flowbp_sparse", [*overrides, "encoder.cpus=0.1"])


def measure(size: Size, rounds: int) -> list[Spent]:
    """`rounds` steps, after three that do not count."""
    actors, rows = started(size), []
    roles = Roles(emulated.RemoteEncoder, settings=lambda config: nothing(size))
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(size, folder)
        run = Run.create(config)
        evaluator = Evaluator(config, run, [], PROMPTS * config.data.prompts_per_step)
        with (
            Repeated(config, size, actors, roles) as fleet,
            closing(Tracker(run.folder, config)) as tracker,
            Judges(config, run, evaluator, tracker, lambda line: None) as judges,
        ):
            loop = Loop(config, run, fleet, tracker, Progress(config.steps, quiet=True), judges, Interrupts())
            loop.restore([])
            fleet.pause = size.pause
            for step in range(rounds + 3):
                before = reading(fleet.pipeline)
                loop.step(step)
                loop.done += 1
                rows.append(Spent(*(now - then for now, then in zip(reading(fleet.pipeline), before, strict=True))))
    for actor in (each for pool in actors for each in pool):
        ray.kill(actor)
    return rows[3:]


def reading(pipeline: Pipeline) -> tuple[float, ...]:
    """The counters and clocks, in the order of `Spent`."""
    clocks = (time.thread_time(), time.process_time(), time.perf_counter())
    return (pipeline.looks, pipeline.looked_at, *clocks)


def columns(ratio: Ratio | Size, items: int, images: int, looks: float, looked_at: float) -> list[float]:
    """What each of `COLUMNS` is multiplied by. images: of the batch."""
    return [1.0, ratio.learners, items, images, looks, looked_at]


def fitted(table: Sequence[Sequence[float]], spent: Sequence[float], scan: float) -> dict[str, float]:
    """Non-negative least squares of relative errors, so that the large steps do not decide everything. scan: known."""
    seconds = np.array(spent)
    known, others = np.array(table)[:, -1] * scan, np.array(table)[:, :-1]
    found = nnls(others / seconds[:, None], (seconds - known) / seconds)[0].tolist()
    return dict(zip(COLUMNS, [*found, scan], strict=True))


def _nothing() -> None:
    pass


def scanning(calls: int = 1000, times: int = 20) -> float:
    """CPU seconds of `ray.wait` for each of `calls` calls that have not ended: the least of `times`."""
    never: Any = ray.remote(_nothing).options(resources={"nowhere": 1})
    refs, least = [never.remote() for _ in range(calls)], float("inf")
    for _ in range(times):
        began = time.thread_time()
        ray.wait(refs, num_returns=calls, timeout=0)
        least = min(least, time.thread_time() - began)
    for ref in refs:
        ray.cancel(ref)
    return least / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each size, of which the cheapest counts")
    parser.add_argument("--bench", type=Path, nargs="+", default=[], help="bench.json of emulated runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start_ray("local")
    scan, rows = scanning(), []
    for size in SIZES:
        rows.append((size, min(measure(size, options.rounds), key=lambda spent: spent.thread_s)))
        print(*rows[-1], file=sys.stderr, flush=True)
    ray.shutdown()
    table = [columns(s, s.items, s.items * s.images, spent.looks, spent.looked_at) for s, spent in rows]
    seconds = [spent.thread_s for _, spent in rows]
    points = [p for file in options.bench for p in json.loads(file.read_text())["points"]]
    for p in points:
        table.append(columns(Ratio(**p["ratio"]), p["items"], p["batch"], p["looks"], p["looked_at"]))
        seconds.append(p["driver_thread_s"])
    source = f"benchmarks.driver_costs, {len(rows)} sizes of steps, {len(points)} benches, {psutil.cpu_count()} cores"
    costs = DriverCosts(source=source, **fitted(table, seconds, scan))
    if options.out:
        options.out.write_text(json.dumps(costs.model_dump(), indent=1) + "\n")
    printed = [asdict(size) | asdict(spent) for size, spent in rows]
    errors = [float(e) for e in np.array(table) @ [getattr(costs, c) for c in COLUMNS] / np.array(seconds) - 1]
    print(json.dumps({"rows": printed, "costs": costs.model_dump(), "errors": errors}, indent=1))


if __name__ == "__main__":
    main()
