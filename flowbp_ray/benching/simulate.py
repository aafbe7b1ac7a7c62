"""Simulate the loop without actors: how long a step takes with thousands of samplers, and how busy the driver is.

A discrete-event simulation of `driver.Loop`, `Pipeline` (two calls in flight per worker, first come first served, the
least loaded worker first) and `LearnerGroup`. Workers take their seconds from a profile or a measured point; the driver
is one thread that pays for every call and answer what `benchmarks.driver_costs` measured. Bytes are counted, but their
transfer takes no time: the network is assumed to be wide enough.
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
from flowbp_ray.utils.settings import LOOKING, MAX_CALLS_IN_FLIGHT, Strict

CALLS_OF_A_RANK = 3  # in a step: for the step, its weights and their checksums


class DriverCosts(Strict):
    """CPU seconds of the driver's thread. source: where they were measured, as text.

    step: of a step. rank: of a learner rank in a step. item: of an item, with its two calls and two answers. row: of an
    image, such as its metrics. look: of a look for answers; scan: of each call that is in flight then.
    """

    source: str = ""
    step: float = 0.0
    rank: float = 0.0
    item: float = 0.0
    row: float = 0.0
    look: float = 0.0
    scan: float = 0.0

    @classmethod
    def shipped(cls) -> DriverCosts:
        """The measured costs that come with the package."""
        return cls.model_validate_json((loading.shipped() / "driver_costs.json").read_text())


@dataclass(frozen=True)
class SimulatedPoint:
    """Means over the simulated steps at one ratio.

    batch: images of a step. driver_s: seconds of a step in which the driver's thread is busy. looks: for answers, in a
    step; looked_at: the calls in flight, summed over these. messages, travel_bytes: of a step.
    """

    ratio: Ratio
    batch: int
    step_s: float
    driver_s: float
    looks: float
    looked_at: float
    messages: int
    travel_bytes: float

    @property
    def images_per_s(self) -> float:
        """Training images per second."""
        return self.batch / self.step_s

    def to_dict(self) -> dict[str, Any]:
        """For bench.json."""
        share = self.driver_s / self.step_s
        plain = {**self.__dict__, "ratio": self.ratio.__dict__}
        return plain | {"images_per_s": self.images_per_s, "driver_share": share}


class Workers:
    """A pool of workers, each of which does its calls one after the other.

    free: when each worker will have done its calls; load: its calls in flight; version: the one that it has loaded.
    """

    def __init__(self, count: int) -> None:
        self.free = [0.0] * count
        self.load = [0] * count
        self.version = [-1] * count
        # for each load below the limit a heap of workers; an entry whose worker has another load by now is skipped
        self.with_room = [list(range(count)), *([] for _ in range(MAX_CALLS_IN_FLIGHT - 1))]

    def acquire(self) -> int | None:
        """Reserve a call at the least loaded worker, the first among equals; None where all have as many as allowed."""
        for load, heap in enumerate(self.with_room):
            while heap:
                number = heapq.heappop(heap)
                if self.load[number] == load:
                    self._set_load(number, load + 1)
                    return number
        return None

    def release(self, number: int) -> None:
        """The worker has answered a call."""
        self._set_load(number, self.load[number] - 1)

    def _set_load(self, number: int, load: int) -> None:
        self.load[number] = load
        if load < MAX_CALLS_IN_FLIGHT:
            heapq.heappush(self.with_room[load], number)

    def call(self, number: int, now: float, seconds: float) -> float:
        """Call the worker at the moment `now` with work of `seconds`; return the moment of its answer."""
        self.free[number] = max(now, self.free[number]) + seconds
        return self.free[number]


@dataclass
class SimulatedLoop:
    """The state of a simulated run.

    now: the driver's clock; busy: seconds of it in which the driver's thread computed. rested: when it may look for
    answers again; looks, looked_at: how often it has, and at how many calls in flight in all. issued: batches whose
    items were submitted. events: answers to come, as (moment, order, stage, batch, worker). queued, rolled: batches of
    the items that wait for a sampler and for a reward server. done: items that are scored, by batch.
    """

    seconds: Seconds
    ratio: Ratio
    costs: DriverCosts
    now: float = 0.0
    busy: float = 0.0
    rested: float = 0.0
    looks: int = 0
    looked_at: int = 0
    issued: int = 0
    events: list[tuple[float, int, str, int, int]] = field(default_factory=list)
    queued: deque[int] = field(default_factory=deque)
    rolled: deque[int] = field(default_factory=deque)
    done: dict[int, int] = field(default_factory=dict)
    order: int = 0

    def __post_init__(self) -> None:
        self.samplers, self.scorers = Workers(self.ratio.samplers), Workers(self.ratio.rewards)

    def spend(self, seconds: float) -> None:
        """The driver's thread computes for `seconds`."""
        self.now += seconds
        self.busy += seconds

    def issue(self, batch: int) -> None:
        """Submit the items of all batches up to `batch`."""
        while self.issued <= batch:
            self.queued.extend([self.issued] * self.seconds.items)
            self.issued += 1
        self.dispatch()

    def dispatch(self) -> None:
        """Make all calls for which a worker has room. A call costs a quarter of `costs.item`, as does an answer."""
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

    def settle(self, learners: int = 0) -> None:
        """Wait for the next answer, take all that have come by then, and make the calls that they allow.

        learners: ranks that are waited for too.
        """
        polled = self.now = max(self.now, self.rested, self.events[0][0])
        self.look(len(self.events) + learners)
        while self.events and self.events[0][0] <= polled:
            _, _, stage, batch, worker = heapq.heappop(self.events)
            self.spend(self.costs.item / 4)
            if stage == "roll":
                self.samplers.release(worker)
                self.rolled.append(batch)
            else:
                self.scorers.release(worker)
                self.done[batch] = self.done.get(batch, 0) + 1
        self.dispatch()

    def look(self, calls: int) -> None:
        """Look for answers among the calls in flight, and rest so long that looking takes LOOKING of the time."""
        self.looks, self.looked_at = self.looks + 1, self.looked_at + calls
        self.spend(self.costs.look + self.costs.scan * calls)
        self.rested = self.now + self.costs.scan * calls * (1 / LOOKING - 1)

    def step(self, step: int) -> None:
        """As `driver.Loop.step`: issue, collect, learn and publish. Items go on while the learners compute."""
        self.spend(self.costs.row * self.seconds.batch)
        self.issue(step + self.ratio.staleness)
        while self.done.get(step, 0) < self.seconds.items:
            self.settle()
        self.spend(self.costs.rank * self.ratio.learners)
        ready = self.now + self.seconds.learner / self.ratio.learners + self.seconds.fixed
        while self.events and max(self.events[0][0], self.rested) <= ready:
            self.settle(self.ratio.learners)
        self.now = max(self.now, ready)
        for _ in range(CALLS_OF_A_RANK):  # the ranks answer together
            self.look(len(self.events) + self.ratio.learners)
        self.spend(self.costs.step)


def simulate(
    seconds: Seconds,
    ratio: Ratio,
    costs: DriverCosts | None = None,
    steps: int = 6,
    bytes_per_image: float = 0.0,
    weight_bytes: float = 0.0,
) -> SimulatedPoint:
    """Simulate `steps` steps, after staleness + 2 steps that do not count.

    bytes_per_image: that travel with an image. weight_bytes: of a version, which each sampler loads once a step.
    """
    loop = SimulatedLoop(seconds, ratio, costs or DriverCosts())
    warm = ratio.staleness + 2
    for step in range(warm):
        loop.step(step)
    began, busy, looks, looked_at = loop.now, loop.busy, loop.looks, loop.looked_at
    for step in range(warm, warm + steps):
        loop.step(step)
    return SimulatedPoint(
        ratio=ratio,
        batch=seconds.batch,
        step_s=(loop.now - began) / steps,
        driver_s=(loop.busy - busy) / steps,
        looks=(loop.looks - looks) / steps,
        looked_at=(loop.looked_at - looked_at) / steps,
        messages=4 * seconds.items + 2 * CALLS_OF_A_RANK * ratio.learners,
        travel_bytes=bytes_per_image * seconds.batch + weight_bytes * ratio.samplers,
    )


def scale_up(seconds: Seconds, ratio: Ratio, factor: int) -> tuple[Seconds, Ratio]:
    """`factor` times as many processes with a batch `factor` times as large: the same work for each process."""
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
) -> list[SimulatedPoint]:
    """Simulate `ratio` multiplied by each of the factors, the batch growing with it."""
    pairs = [scale_up(seconds, ratio, factor) for factor in factors]
    return [simulate(s, r, costs, 4, bytes_per_image, weight_bytes) for s, r in pairs]
