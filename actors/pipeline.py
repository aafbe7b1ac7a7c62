"""The pipeline of items through samplers and reward servers, with retries. It handles reports and references only.

Executing an item twice gives the same bits, so after a failure it is issued again, to another actor if possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.encoding import Encoding
from actors.errors import Ref, arguments_arrived, cause, is_permanent, lacks_embeddings, lacks_weights
from actors.pool import Pool
from actors.transport import Published
from flowbp_ray.messages import Evaluated, Item, RolloutReport, Scored, ScoredItem
from flowbp_ray.utils.errors import RunFailed, Stalled


@dataclass(eq=False)
class Job:
    """The state of an item. refs: the last rollout's results; pending: the reference that is waited for."""

    item: Item
    weights: Published
    stage: str = "queued"  # queued -> rolling -> rolled -> scoring -> done
    worker: int | None = None
    failed_on: int | None = None
    tries: int = 0
    parts: Sequence[Ref] = ()  # of the embeddings, as the last rollout got them
    refs: tuple[Ref, ...] = ()
    pending: Ref | None = None
    report: RolloutReport | None = None
    result: Scored | Evaluated | None = None
    cotangent: Ref | None = None
    pictures: Ref | None = None  # [rows, H, W, 3] uint8, in a run with a gate
    dropped: bool = False  # belongs to an earlier incarnation; its worker is still busy with it

    def scored(self) -> ScoredItem:
        """The result of a finished training item."""
        # refs[1] is the `Rollout`, the learner's part.
        assert self.report is not None and isinstance(self.result, Scored)
        return ScoredItem(self.item, self.report, self.result, self.refs[1], self.cotangent, self.pictures)


def arrivals(refs: list[Ref], timeout: float) -> list[Ref]:
    """The references in `refs` that are ready, or else the first that becomes ready within `timeout` seconds.

    All ready ones are taken at once, because each `ray.wait` costs microseconds per call in flight, of which there may
    be thousands.
    """
    ready: list[Ref] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
    return ready or ray.wait(refs, num_returns=1, timeout=timeout)[0]


def wait_for_any(refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
    """The first of `refs` that is there within `timeout` seconds, and the others."""
    ready, left = ray.wait(list(refs), timeout=timeout)
    return ready, left


class Pipeline:
    """Gives items to the pools in the order in which they were submitted, up to MAX_CALLS_IN_FLIGHT per actor."""

    def __init__(
        self,
        samplers: Pool,
        scorers: Pool,
        encoding: Encoding,
        prompts: Sequence[str],
        tries: int,
        stall_timeout: float,
        pictures: bool = False,
        on_wait: Callable[[Pipeline, Sequence[Job]], None] = lambda pipeline, wanted: None,
    ) -> None:
        """pictures: whether the reward servers return the targets' pictures too.

        on_wait: called repeatedly while the driver waits, with the items that it waits for (see `queue_stats`).
        """
        self.samplers, self.scorers = samplers, scorers
        self.encoding, self.prompts = encoding, prompts
        self.tries, self.stall_timeout, self.pictures = tries, stall_timeout, pictures
        self.jobs: list[Job] = []
        self.retries = 0
        self.on_wait = on_wait

    def submit(self, items: Iterable[Item], weights: Published) -> None:
        self.jobs += [Job(item, weights) for item in items]
        self._dispatch()

    def collect(self, step: int) -> list[ScoredItem]:
        """Wait until every training item of `step` is scored; return them in the order of their index.

        The steps before are done: prompts that are not needed soon are let go of.
        """
        self.encoding.advance(step)
        return [job.scored() for job in self._collect("train", step)]

    def _collect(self, purpose: str, step: int) -> list[Job]:
        """Wait until every submitted item of (purpose, step) is done; return them in the order of their index.

        Raises Stalled if no call ends for `stall_timeout` seconds.
        """
        wanted = [j for j in self.jobs if (j.item.purpose, j.item.step) == (purpose, step) and not j.dropped]
        moved = time.monotonic()
        while any(job.stage != "done" for job in wanted):
            self.on_wait(self, wanted)
            if self._pump():
                moved = time.monotonic()
            elif time.monotonic() - moved > self.stall_timeout:
                state = self.state()
                raise Stalled(f"nothing moved for {self.stall_timeout:.0f} s: {state['summary']}", state)
        taken = set(map(id, wanted))  # a search in a list of thousands would take seconds
        self.jobs = [job for job in self.jobs if id(job) not in taken]
        return sorted(wanted, key=lambda job: job.item.index)

    def draw(self, items: Sequence[Item], weights: Published) -> list[Evaluated]:
        """Sample and score the items of an evaluation; return the results in order."""
        self.submit(items, weights)
        jobs = self._collect(items[0].purpose, items[0].step)
        return [job.result for job in jobs if isinstance(job.result, Evaluated)]

    def drop(self) -> None:
        """Drop all items. A worker that is busy with one is free again when its call ends."""
        self.jobs = [job for job in self.jobs if job.pending is not None]
        for job in self.jobs:
            job.dropped = True

    def wait_for(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        """Do as `ray.wait(refs, timeout=timeout)`, and keep items moving: return the ready ones of `refs`, the others.

        A sampler has at most MAX_CALLS_IN_FLIGHT items. If an optimizer step takes longer than these, a driver that
        waited for the learners only would leave samplers idle, and staleness 1 would hide less time than it can
        (docs/benchmarking.md has the numbers).
        """
        until = time.monotonic() + timeout
        while True:
            self.on_wait(self, ())
            running, encoding = self._running(), self.encoding.pending
            left = until - time.monotonic()
            # at most 1 s, to notice recovered actors
            found = arrivals([*refs, *running, *encoding], min(1.0, max(0.0, left)))
            self._settle_all(found, running, encoding)
            self.samplers.recover()
            self.scorers.recover()
            self._dispatch()
            ready = [ref for ref in found if ref not in running and ref not in encoding]
            if ready or left <= 0:
                return ready, [ref for ref in refs if ref not in ready]

    def _pump(self) -> bool:
        """Dispatch work, then wait up to a second for a call to end; return whether one did.

        The encoder's calls count while no item is with an actor: all of them may wait for their prompts.
        """
        self.samplers.recover()
        self.scorers.recover()
        self._dispatch()
        running, encoding = self._running(), self.encoding.pending
        if not running and not encoding:
            time.sleep(0.05)
            return False
        ready = arrivals([*running, *encoding], 1.0)
        self._settle_all(ready, running, encoding)
        self._dispatch()
        return any(ref in running for ref in ready) or bool(ready and not running)

    def _running(self) -> dict[Ref, Job]:
        """The items with a call in flight, by what is waited for."""
        return {job.pending: job for job in self.jobs if job.pending is not None}

    def _settle_all(self, found: Sequence[Ref], running: Mapping[Ref, Job], encoding: Sequence[Ref]) -> None:
        """Settle the calls of items and of the encoder among `found`."""
        self.encoding.check()
        for ref in found:
            if ref in running:
                self._settle(running[ref])
            elif ref in encoding:
                self.encoding.settle(ref)

    def _dispatch(self) -> None:
        """Give items to free actors, in order, until both pools are full."""
        full: set[str] = set()
        for job in self.jobs:
            pool = {"queued": self.samplers, "rolled": self.scorers}.get(job.stage)
            if pool is None or pool.name in full:
                continue
            if job.stage == "queued" and not self._encoded(job.item):
                continue
            worker = pool.acquire(job.failed_on)
            if worker is not None:
                (self._roll if job.stage == "queued" else self._score)(job, worker)
            elif job.failed_on is None:  # otherwise the pool may have room, and the job waits for another actor
                full.add(pool.name)
                if len(full) == 2:
                    return

    def _encoded(self, item: Item) -> bool:
        return self.encoding.has(item.prompt_ids, item.step if item.purpose == "train" else -1)

    def _roll(self, job: Job, worker: int) -> None:
        actor = self.samplers.handles[worker]
        method, returns = (actor.rollout, 3) if job.item.plans else (actor.sample, 2)
        job.parts, weights = self.encoding.refs(job.item.prompt_ids), job.weights.given_to(worker)
        job.refs = tuple(method.options(num_returns=returns).remote(job.item, weights, job.parts))
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
        """Read the small result of a finished call; after a failure put the item back."""
        pool = self.samplers if job.stage == "rolling" else self.scorers
        assert job.worker is not None and job.pending is not None
        worker, ref = job.worker, job.pending
        job.worker = job.pending = None
        pool.release(worker)
        if job.dropped:
            self.jobs.remove(job)
        try:
            value = ray.get(ref)
        except RayError as error:
            if lacks_weights(error):
                job.weights.holders.discard(worker)  # the next call carries references
                job.stage = "queued"
            else:
                if lacks_embeddings(error):
                    self.encoding.lost(job.parts)
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
        """Count the failure; go back to the start of the stage, or of the item if its rollout was lost too."""
        if isinstance(error, RayActorError):
            pool.down(worker)
        else:
            pool.suspect(worker)
        if job.dropped:
            return
        job.weights.check()
        job.tries += 1
        self.retries += 1
        job.failed_on = worker
        if job.tries >= self.tries or is_permanent(error):
            times = f"{job.tries} time{'s' * (job.tries > 1)}"
            what = f"item {job.item.index} of step {job.item.step} failed {times} at a {pool.name}"
            raise RunFailed(f"{what}; the last time: {cause(error)}") from error
        lost_rollout = job.stage == "scoring" and not (isinstance(error, RayActorError) or arguments_arrived(error))
        if lost_rollout:
            job.failed_on = None  # this index is of a reward server, and the next stage is a sampler's
        job.stage = "queued" if job.stage == "rolling" or lost_rollout else "rolled"

    def _check_weights(self, job: Job, worker: int, held: str) -> None:
        """Raises RunFailed unless the sampler's weights have the fingerprint of the learners' masters."""
        stated, version = job.weights.fingerprint, job.item.version
        if held != stated:
            raise RunFailed(
                f"sampler {worker} held weights {held} as version {version.step}{' of the average' * version.ema}, but "
                f"the learners' masters are {stated}: what was published is not what was trained"
            )

    def state(self) -> dict[str, Any]:
        """The state of all items and actors, for `Stalled`; `summary` is one line."""
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
