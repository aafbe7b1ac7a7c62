"""Items through samplers and reward servers, with retries: the driver sees only small reports and references.

Doing an item twice gives the same bits, so a failure is answered by issuing it again, elsewhere where possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.errors import arguments_arrived, cause, is_permanent
from actors.pool import Pool
from actors.transport import Published, Reference
from flowbp_ray.messages import Evaluated, Item, RolloutReport, Scored, ScoredItem
from flowbp_ray.utils.errors import RunFailed, Stalled


@dataclass(eq=False)
class Job:
    """Where an item stands. `refs` are what the last stage returned; `pending` is the one that is waited for."""

    item: Item
    weights: Published
    stage: str = "queued"  # queued -> rolling -> rolled -> scoring -> done
    worker: int | None = None
    failed_on: int | None = None
    tries: int = 0
    refs: tuple[Any, ...] = ()
    pending: Any = None
    report: RolloutReport | None = None
    result: Scored | Evaluated | None = None
    cotangent: Any = None
    pictures: Any = None  # [rows, H, W, 3] uint8, where a gate wants to see them
    dropped: bool = False  # of an incarnation that is gone: its worker is still busy with it

    def scored(self) -> ScoredItem:
        """What is known of a training item that is done; the second reference is the learner's part of its rollout."""
        assert self.report is not None and isinstance(self.result, Scored)
        return ScoredItem(self.item, self.report, self.result, self.refs[1], self.cotangent, self.pictures)


def arrivals(refs: list[Any], timeout: float) -> list[Any]:
    """Those of `refs` that are there, or else the first to come within `timeout` seconds.

    All at a time: looking costs the driver microseconds for each call in flight, of which there may be thousands.
    """
    ready: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
    return ready or ray.wait(refs, num_returns=1, timeout=timeout)[0]


class Pipeline:
    """Bounded by the pools' depth and by the items that the driver submits; first come, first served."""

    def __init__(
        self,
        samplers: Pool,
        scorers: Pool,
        embeddings: Reference,
        prompts: Sequence[str],
        tries: int,
        stall_timeout: float,
        pictures: bool = False,
        on_wait: Callable[[Pipeline, Sequence[Job]], None] = lambda pipeline, wanted: None,
    ) -> None:
        """pictures: the reward servers return those of the targets too.

        on_wait: called again and again while the driver waits, with the items that it waits for (see `queue_stats`).
        """
        self.samplers, self.scorers = samplers, scorers
        self.embeddings, self.prompts = embeddings, prompts
        self.tries, self.stall_timeout, self.pictures = tries, stall_timeout, pictures
        self.jobs: list[Job] = []
        self.retries = 0
        self.on_wait = on_wait

    def submit(self, items: Iterable[Item], weights: Published) -> None:
        self.jobs += [Job(item, weights) for item in items]
        self._dispatch()

    def collect(self, step: int) -> list[ScoredItem]:
        """Wait until every training item of `step` is scored; give them back in the order of their index."""
        return [job.scored() for job in self._collect("train", step)]

    def _collect(self, purpose: str, step: int) -> list[Job]:
        """Wait until every submitted item of (purpose, step) is done; give them back in the order of their index."""
        wanted = [j for j in self.jobs if (j.item.purpose, j.item.step) == (purpose, step) and not j.dropped]
        moved = time.monotonic()
        while any(job.stage != "done" for job in wanted):
            self.on_wait(self, wanted)
            if self._pump():
                moved = time.monotonic()
            elif time.monotonic() - moved > self.stall_timeout:
                state = self.state()
                raise Stalled(f"nothing moved for {self.stall_timeout:.0f} s: {state['summary']}", state)
        taken = set(map(id, wanted))  # comparing thousands of items with each other would take seconds
        self.jobs = [job for job in self.jobs if id(job) not in taken]
        return sorted(wanted, key=lambda job: job.item.index)

    def draw(self, items: Sequence[Item], weights: Published) -> list[Evaluated]:
        """The items of an evaluation through samplers and reward servers, in order."""
        self.submit(items, weights)
        jobs = self._collect(items[0].purpose, items[0].step)
        return [job.result for job in jobs if isinstance(job.result, Evaluated)]

    def drop(self) -> None:
        """Forget all items; workers that are at one are free again when it ends."""
        self.jobs = [job for job in self.jobs if job.pending is not None]
        for job in self.jobs:
            job.dropped = True

    def wait_for(self, refs: Sequence[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """As `ray.wait(refs, timeout=timeout)`, while items go on: the first of `refs` that are there, and the others.

        Samplers have MAX_CALLS_IN_FLIGHT items each. Where an optimizer step takes longer than those, a driver that
        only looked at the learners would leave samplers idle, and staleness 1 would hide less than it can
        (docs/benchmarking.md has the numbers).
        """
        until = time.monotonic() + timeout
        while True:
            self.on_wait(self, ())
            running = {job.pending: job for job in self.jobs if job.pending is not None}
            left = until - time.monotonic()
            found = arrivals([*refs, *running], min(1.0, max(0.0, left)))  # some who were down may be back meanwhile
            for ref in found:
                if ref in running:
                    self._settle(running[ref])
            self.samplers.recover()
            self.scorers.recover()
            self._dispatch()
            ready = [ref for ref in found if ref not in running]
            if ready or left <= 0:
                return ready, [ref for ref in refs if ref not in ready]

    def _pump(self) -> bool:
        """Give out work, then wait shortly for something to end; True if something did."""
        self.samplers.recover()
        self.scorers.recover()
        self._dispatch()
        running = {job.pending: job for job in self.jobs if job.pending is not None}
        if not running:
            time.sleep(0.05)
            return False
        ready = arrivals(list(running), 1.0)
        for ref in ready:
            self._settle(running[ref])
        self._dispatch()
        return bool(ready)

    def _dispatch(self) -> None:
        """Give out, in order, until both pools are full."""
        full: set[str] = set()
        for job in self.jobs:
            pool = {"queued": self.samplers, "rolled": self.scorers}.get(job.stage)
            if pool is None or pool.name in full:
                continue
            worker = pool.acquire(job.failed_on)
            if worker is not None:
                (self._roll if job.stage == "queued" else self._score)(job, worker)
            elif job.failed_on is None:  # else it only waits for another one than that
                full.add(pool.name)
                if len(full) == 2:
                    return

    def _roll(self, job: Job, worker: int) -> None:
        actor = self.samplers.handles[worker]
        method, returns = (actor.rollout, 3) if job.item.plans else (actor.sample, 2)
        job.refs = tuple(method.options(num_returns=returns).remote(job.item, job.weights.weights, self.embeddings))
        job.stage, job.worker, job.pending = "rolling", worker, job.refs[0]

    def _score(self, job: Job, worker: int) -> None:
        actor = self.scorers.handles[worker]
        texts = [self.prompts[i] for i in job.item.prompt_ids]
        if job.item.plans:
            call = actor.score.options(num_returns=3 if self.pictures else 2)
            answers = call.remote(job.item, texts, job.refs[0], job.refs[2])
            scored, job.cotangent, job.pictures = (*answers, None)[:3]
        else:
            scored = actor.evaluate.remote(job.item, texts, job.refs[1])
        job.stage, job.worker, job.pending = "scoring", worker, scored

    def _settle(self, job: Job) -> None:
        """Read the small result of a stage; on failure put the item back."""
        pool = self.samplers if job.stage == "rolling" else self.scorers
        assert job.worker is not None
        worker, ref = job.worker, job.pending
        job.worker = job.pending = None
        pool.release(worker)
        if job.dropped:
            self.jobs.remove(job)
        try:
            value = ray.get(ref)
        except RayError as error:
            self._failed(job, pool, worker, error)
            return
        if job.dropped:
            return
        job.failed_on = None
        if job.stage == "rolling":
            job.report = value if job.item.plans else None
            self._check_weights(job, worker, value.fingerprint if job.item.plans else value)
            job.stage = "rolled"
        else:
            job.result, job.stage = value, "done"

    def _failed(self, job: Job, pool: Pool, worker: int, error: RayError) -> None:
        """Count the try; go back to the start of the stage, or of the item where its rollout was lost too."""
        if isinstance(error, RayActorError):
            pool.down(worker)
        else:
            pool.suspect(worker)
        if job.dropped:
            return
        job.tries += 1
        self.retries += 1
        job.failed_on = worker
        if job.tries >= self.tries or is_permanent(error):
            times = f"{job.tries} time{'s' * (job.tries > 1)}"
            what = f"item {job.item.index} of step {job.item.step} failed {times} at a {pool.name}"
            raise RunFailed(f"{what}; the last time: {cause(error)}") from error
        lost_rollout = job.stage == "scoring" and not (isinstance(error, RayActorError) or arguments_arrived(error))
        if lost_rollout:
            job.failed_on = None  # it names a reward server, and a sampler is next
        job.stage = "queued" if job.stage == "rolling" or lost_rollout else "rolled"

    def _check_weights(self, job: Job, worker: int, held: str) -> None:
        """What the sampler held must be what the learners' masters say; a retry could not mend a difference."""
        stated, version = job.weights.fingerprint, job.item.version
        if held != stated:
            raise RunFailed(
                f"sampler {worker} held weights {held} as version {version.step}{' of the average' * version.ema}, but "
                f"the learners' masters are {stated}: what was published is not what was trained"
            )

    def state(self) -> dict[str, Any]:
        """Where every item stands, and who is busy or down; `summary` in one line."""
        counts: dict[str, int] = {}
        for job in self.jobs:
            counts[job.stage] = counts.get(job.stage, 0) + 1
        pools = (self.samplers, self.scorers)
        down = {pool.name: pool.silent for pool in pools if pool.silent}
        return {
            "summary": f"items {counts}, actors that do not answer {down or 'none'}",
            "items": [
                {"purpose": j.item.purpose, "step": j.item.step, "index": j.item.index, "stage": j.stage}
                | {"worker": j.worker, "tries": j.tries, "dropped": j.dropped}
                for j in self.jobs
            ],
            "calls in flight": {pool.name: list(pool.load) for pool in pools},
            "do not answer": down,
        }
