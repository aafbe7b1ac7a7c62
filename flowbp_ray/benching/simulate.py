"""The loop without actors: who waits for whom when there are thousands of samplers, and what the driver costs then.

A discrete-event simulation of `driver.Loop`, `Pipeline` (two calls in flight per worker, first come first served, the
least loaded first), `Meanwhile` and `Gang`. Workers take their seconds from a profile or a measured point; the driver
is one thread whose every call and answer costs what `benchmarks.driver_costs` measured. Bytes are counted, their
transfer is not timed: the network is taken to be wide enough.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flowbp_ray.benching.points import Ratio
from flowbp_ray.benching.predict import Seconds
from flowbp_ray.config import loading
from flowbp_ray.utils.settings import MAX_CALLS_IN_FLIGHT, Strict


class DriverCosts(Strict):
    """CPU seconds of the driver's thread: of a step; of an item, with its two calls and answers; of every look at what
    is there for each call that is in flight then; of a learner rank in a step. `source` says where they were measured.
    """

    source: str = ""
    step: float = 0.0
    item: float = 0.0
    scan: float = 0.0
    rank: float = 0.0

    @classmethod
    def shipped(cls) -> DriverCosts:
        """Those that were measured."""
        return cls.model_validate_json((loading.shipped() / "driver_costs.json").read_text())


@dataclass(frozen=True)
class Simulated:
    """Means over the steps that count. driver: seconds of a step in which the driver's thread is busy."""

    ratio: Ratio
    batch: int
    step_s: float
    driver_s: float
    messages: int
    travel_bytes: float

    @property
    def images_per_s(self) -> float:
        return self.batch / self.step_s

    def to_dict(self) -> dict[str, Any]:
        share = self.driver_s / self.step_s
        plain = {**self.__dict__, "ratio": self.ratio.__dict__}
        return plain | {"images_per_s": self.images_per_s, "driver_share": share}


class Workers:
    """A pool: each worker does its calls one after the other; an answer's moment is known when the call is made."""

    def __init__(self, count: int) -> None:
        self.free = [0.0] * count
        self.load = [0] * count
        self.version = [-1] * count
        self.idle = [
            list(range(count)),
            *([] for _ in range(MAX_CALLS_IN_FLIGHT - 1)),
        ]  # heaps by load

    def acquire(self) -> int | None:
        """The least loaded worker with room, by number among equals."""
        for load, heap in enumerate(self.idle):
            while heap:
                number = heapq.heappop(heap)
                if self.load[number] == load:
                    self._now(number, load + 1)
                    return number
        return None

    def release(self, number: int) -> None:
        self._now(number, self.load[number] - 1)

    def _now(self, number: int, load: int) -> None:
        self.load[number] = load
        if load < MAX_CALLS_IN_FLIGHT:
            heapq.heappush(self.idle[load], number)

    def call(self, number: int, now: float, seconds: float) -> float:
        self.free[number] = max(now, self.free[number]) + seconds
        return self.free[number]


@dataclass
class Loop:
    """The state of a simulated run; `now` is the driver's clock."""

    seconds: Seconds
    ratio: Ratio
    costs: DriverCosts
    now: float = 0.0
    busy: float = 0.0
    issued: int = 0
    events: list[tuple[float, int, str, int, int]] = field(default_factory=list)  # moment, order, stage, batch, worker
    queued: deque[int] = field(default_factory=deque)  # batches of the items that wait for a sampler
    rolled: deque[int] = field(default_factory=deque)
    done: dict[int, int] = field(default_factory=dict)
    order: int = 0

    def __post_init__(self) -> None:
        self.samplers, self.scorers = Workers(self.ratio.samplers), Workers(self.ratio.rewards)

    def spend(self, seconds: float) -> None:
        """The driver's thread is at work."""
        self.now += seconds
        self.busy += seconds

    def issue(self, batch: int) -> None:
        while self.issued <= batch:
            self.queued.extend([self.issued] * self.seconds.items)
            self.issued += 1
        self.dispatch()

    def dispatch(self) -> None:
        """Give out what can be given out; a call costs a quarter of an item, as does an answer."""
        for waiting, pool, stage in ((self.queued, self.samplers, "roll"), (self.rolled, self.scorers, "score")):
            while waiting and (worker := pool.acquire()) is not None:
                batch = waiting.popleft()
                self.spend(self.costs.item / 4)
                seconds = self.seconds.reward if stage == "score" else self.seconds.sampler
                version = max(0, batch - self.ratio.staleness)
                if stage == "roll" and pool.version[worker] != version:
                    pool.version[worker], seconds = version, seconds + self.seconds.load
                self.order += 1
                moment = pool.call(worker, self.now, seconds)
                heapq.heappush(self.events, (moment, self.order, stage, batch, worker))

    def settle(self) -> None:
        """Take the next answer and all that came meanwhile, and give out what they make possible."""
        looked = self.now = max(self.now, self.events[0][0])
        self.spend(self.costs.scan * len(self.events))
        while self.events and self.events[0][0] <= looked:
            _, _, stage, batch, worker = heapq.heappop(self.events)
            self.spend(self.costs.item / 4)
            if stage == "roll":
                self.samplers.release(worker)
                self.rolled.append(batch)
            else:
                self.scorers.release(worker)
                self.done[batch] = self.done.get(batch, 0) + 1
        self.dispatch()

    def step(self, step: int) -> None:
        """As `driver.Loop.step`: issue, collect, learn and publish; items go on while the learners are at work."""
        self.issue(step + self.ratio.staleness)
        while self.done.get(step, 0) < self.seconds.items:
            self.settle()
        self.spend(self.costs.rank * self.ratio.learners)
        ready = self.now + self.seconds.learner / self.ratio.learners + self.seconds.fixed
        while self.events and self.events[0][0] <= ready:
            self.settle()
        self.now = max(self.now, ready)
        self.spend(self.costs.step)


def simulate(
    seconds: Seconds,
    ratio: Ratio,
    costs: DriverCosts | None = None,
    steps: int = 6,
    bytes_per_image: float = 0.0,
    weight_bytes: float = 0.0,
) -> Simulated:
    """`steps` steps after as many as staleness + 2 that do not count. weight_bytes: of a version, once per sampler."""
    loop = Loop(seconds, ratio, costs or DriverCosts())
    warm = ratio.staleness + 2
    for step in range(warm):
        loop.step(step)
    began, busy = loop.now, loop.busy
    for step in range(warm, warm + steps):
        loop.step(step)
    return Simulated(
        ratio=ratio,
        batch=seconds.batch,
        step_s=(loop.now - began) / steps,
        driver_s=(loop.busy - busy) / steps,
        messages=4 * seconds.items + 6 * ratio.learners,
        travel_bytes=bytes_per_image * seconds.batch + weight_bytes * ratio.samplers,
    )


def grown(seconds: Seconds, ratio: Ratio, factor: int) -> tuple[Seconds, Ratio]:
    """The same work for each process on `factor` times as many of them: a batch as many times as large."""
    larger = Seconds(
        batch=seconds.batch * factor,
        items=seconds.items * factor,
        sampler=seconds.sampler,
        reward=seconds.reward,
        learner=seconds.learner * factor,
        load=seconds.load,
        fixed=seconds.fixed,
    )
    counts = (ratio.samplers * factor, ratio.learners * factor, ratio.rewards * factor)
    return larger, Ratio(*counts, ratio.staleness)


def sweep(
    seconds: Seconds,
    ratio: Ratio,
    factors: Sequence[int],
    costs: DriverCosts,
    bytes_per_image: float,
    weight_bytes: float,
) -> list[Simulated]:
    """`ratio` times each of the factors."""
    pairs = [grown(seconds, ratio, factor) for factor in factors]
    return [simulate(s, r, costs, 4, bytes_per_image, weight_bytes) for s, r in pairs]
