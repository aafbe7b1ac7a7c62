"""The pipeline of items through samplers and reward servers, with retries. It handles reports and references only.

Executing an item twice gives the same bits, so after a failure it is issued again, to another actor if possible.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.encoding import Encoding
from actors.errors import (
    LearnersLost,
    Ref,
    arguments_arrived,
    cause,
    is_permanent,
    lacks_embeddings,
    lacks_weights,
    object_lost,
)
from actors.jobs import Job, answers, end_overdue, state_of
from actors.pool import Pool
from actors.transport import Published
from flowbp_ray.messages import Evaluated, Item, ScoredItem
from flowbp_ray.utils.errors import RunFailed, Stalled
from flowbp_ray.utils.settings import LOOKING


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
        note: Callable[[str], object] = lambda line: None,
    ) -> None:
        """pictures: whether the reward servers return the targets' pictures too. note: takes a line for the log.

        on_wait: called repeatedly while the driver waits, with the items that it waits for (see `queue_stats`).
        """
        self.samplers, self.scorers = samplers, scorers
        self.encoding, self.prompts = encoding, prompts
        self.tries, self.stall_timeout, self.pictures = tries, stall_timeout, pictures
        self.jobs: list[Job] = []
        self.submitted = 0
        self.queued: list[Job] = []  # items that wait for a sampler, in the order of their submission
        self.rolled: list[Job] = []  # for a reward server
        self.running: dict[Ref, Job] = {}  # the items with a call in flight, by what is waited for
        self.retries = 0
        self.on_wait, self.note = on_wait, note
        self.looks = self.looked_at = 0  # looks for answers, and the references that all of them looked at
        self.rest = 0.0  # seconds until the next look

    def submit(self, items: Iterable[Item], weights: Published) -> None:
        for item in items:
            job = Job(item, weights, self.submitted)
            self.submitted += 1
            self.jobs.append(job)
            self.queued.append(job)
        self._dispatch()

    def collect(self, step: int) -> list[ScoredItem]:
        """Wait until every training item of `step` is scored; return them in the order of their index.

        The steps before are done: prompts that are not needed soon are let go of.
        """
        self.encoding.advance(step)
        return [job.scored() for job in self._collect("train", step)]

    def _collect(self, purpose: str, step: int) -> list[Job]:
        """Wait until every submitted item of (purpose, step) is done; return them in the order of their index.

        A worker whose call lasts for `stall_timeout` seconds while no other ends is ended, and the call made again.
        Raises Stalled if that does not help.
        """
        wanted = [j for j in self.jobs if (j.item.purpose, j.item.step) == (purpose, step) and not j.dropped]
        moved = time.monotonic()
        for job in wanted:  # one after the other: to ask all at every look would take milliseconds
            while job.stage != "done":
                self.on_wait(self, wanted)
                if self._pump():
                    moved = time.monotonic()
                elif time.monotonic() - moved > self.stall_timeout:
                    self._unblock()
                    moved = time.monotonic()
        taken = set(map(id, wanted))  # a search in a list of thousands would take seconds
        self.jobs = [job for job in self.jobs if id(job) not in taken]
        return sorted(wanted, key=lambda job: job.item.index)

    def _unblock(self) -> None:
        """End the workers that do not answer, once for each item. Raises Stalled where that has not helped."""
        pools, waited = (self.samplers, self.scorers), f"{self.stall_timeout:.0f} s"
        running = list(self.running.values())
        if all(job.overdue for job in running):
            state = state_of(self.jobs, pools)
            raise Stalled(f"nothing moved for {waited}: {state['summary']}", state)
        if ended := end_overdue(running, pools, time.monotonic() - self.stall_timeout):
            self.note(f"{', '.join(ended)} did not answer within {waited}, so Ray starts what stood still again")

    def draw(self, items: Sequence[Item], weights: Published) -> list[Evaluated]:
        """Sample and score the items of an evaluation; return the results in order."""
        self.submit(items, weights)
        jobs = self._collect(items[0].purpose, items[0].step)
        return [job.result for job in jobs if isinstance(job.result, Evaluated)]

    def result(self, item: Item) -> Evaluated:
        """Wait for a submitted evaluation item, the only one of its step; those after it go on meanwhile."""
        [answer] = [j.result for j in self._collect(item.purpose, item.step) if isinstance(j.result, Evaluated)]
        return answer

    def drop(self) -> None:
        """Drop all items. A worker that is busy with one is free again when its call ends."""
        self.jobs = [job for job in self.jobs if job.pending is not None]
        self.queued, self.rolled = [], []
        for job in self.jobs:
            job.dropped = True

    def wait_for(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        """Do as `ray.wait(refs, timeout=timeout)`, and keep items moving: return the ready ones of `refs`, the others.

        A sampler has at most MAX_CALLS_IN_FLIGHT items. If an optimizer step takes longer than these, a driver that
        waited for the learners only would leave samplers idle, and staleness 1 would hide less time than it can
        (docs/benchmarking.md has the numbers).
        """
        until, mine = time.monotonic() + timeout, set(refs)
        while True:
            self.on_wait(self, ())
            encoding = self.encoding.pending
            left = until - time.monotonic()
            # at most 1 s, to notice recovered actors
            found = self._look([*refs, *self.running, *encoding], min(1.0, max(0.0, left)))
            self._settle_all(found, encoding)
            self._keep_busy()
            ready = [ref for ref in found if ref in mine]
            if ready or left <= 0:
                mine.difference_update(ready)
                return ready, [ref for ref in refs if ref in mine]

    def _pump(self) -> bool:
        """Dispatch work, then wait up to a second for a call to end; return whether one did.

        The encoder's calls count while no item is with an actor: all of them may wait for their prompts.
        """
        self._keep_busy()
        calls, encoding = len(self.running), self.encoding.pending
        if not calls and not encoding:
            time.sleep(0.05)
            return False
        found = self._look([*self.running, *encoding], 1.0)
        settled = self._settle_all(found, encoding)
        self._dispatch()
        return bool(settled or (found and not calls))

    def _look(self, refs: list[Ref], timeout: float) -> list[Ref]:
        """The references in `refs` that are ready, or else the first that becomes ready within `timeout` seconds.

        A look costs time for each reference, of which there may be thousands. So it takes all that are ready, and it is
        followed by a rest, in which answers gather.
        """
        rest = min(self.rest, timeout)
        time.sleep(rest)
        self.looks, self.looked_at = self.looks + 1, self.looked_at + len(refs)
        began = time.thread_time()
        ready: list[Ref] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        self.rest = (time.thread_time() - began) * (1 / LOOKING - 1)
        return ready or ray.wait(refs, num_returns=1, timeout=timeout - rest)[0]

    def _settle_all(self, found: Sequence[Ref], encoding: Sequence[Ref]) -> int:
        """Settle the calls of items and of the encoder among `found`; return how many were of items."""
        self.encoding.check()
        ended = [ref for ref in found if ref in self.running]
        for ref, answer in zip(ended, answers(ended), strict=True):
            self._settle(self.running.pop(ref), answer)
        if encoding:
            for ref in set(encoding).intersection(found):
                self.encoding.settle(ref)
        return len(ended)

    def _keep_busy(self) -> None:
        """Take back the actors that have recovered, and give out items."""
        self.samplers.recover()
        self.scorers.recover()
        self._dispatch()

    def _dispatch(self) -> None:
        """Give items to free actors, in order, until both pools are full."""
        self._give(self.queued, self.samplers, self._roll)
        self._give(self.rolled, self.scorers, self._score)

    def _give(self, waiting: list[Job], pool: Pool, call: Callable[[Job, int], None]) -> None:
        """Make the call of each of these items, in order, until no actor of the pool has room."""
        place = 0
        while place < len(waiting):
            job = waiting[place]
            worker = pool.choose(job.failed_on)
            if worker is None and job.failed_on is None:
                return
            if worker is None or (job.stage == "queued" and not self._encoded(job.item)):
                place += 1  # it waits for another actor than the one that it failed on, or for its prompts
                continue
            del waiting[place]
            pool.assign(worker)
            call(job, worker)

    def _encoded(self, item: Item) -> bool:
        return self.encoding.has(item.prompt_ids, item.step if item.purpose == "train" else -1)

    def _roll(self, job: Job, worker: int) -> None:
        actor = self.samplers.handles[worker]
        method, returns = (actor.rollout, 3) if job.item.plans else (actor.sample, 2)
        job.parts, weights = self.encoding.refs(job.item.prompt_ids), job.weights.given_to(worker)
        job.refs = tuple(method.options(num_returns=returns).remote(job.argument(), weights, job.parts))
        self._called(job, worker, "rolling", job.refs[0])

    def _score(self, job: Job, worker: int) -> None:
        actor = self.scorers.handles[worker]
        texts = [self.prompts[i] for i in job.item.prompt_ids]
        if job.item.plans:
            call = actor.score.options(num_returns=3 if self.pictures else 2)
            answers = call.remote(job.argument(), texts, job.refs[0], job.refs[2])
            scored, job.cotangent, job.pictures = (*answers, None)[:3]
        else:
            scored = actor.evaluate.remote(job.argument(), texts, job.refs[1])
        self._called(job, worker, "scoring", scored)

    def _called(self, job: Job, worker: int, stage: str, pending: Ref) -> None:
        job.stage, job.worker, job.pending, job.called = stage, worker, pending, time.monotonic()
        self.running[pending] = job

    def _waits(self, job: Job, stage: str) -> None:
        job.stage = stage
        if not job.dropped:
            insort(self.queued if stage == "queued" else self.rolled, job, key=lambda job: job.number)

    def _settle(self, job: Job, answer: Any) -> None:
        """Take the small result of a finished call; after a failure put the item back."""
        pool = self.samplers if job.stage == "rolling" else self.scorers
        assert job.worker is not None
        worker = job.worker
        job.worker = job.pending = None
        pool.release(worker)
        if job.dropped:
            self.jobs.remove(job)
        if isinstance(answer, RayError):
            if lacks_weights(answer):
                job.weights.holders.discard(worker)  # the next call carries references
                self._waits(job, "queued")
            else:
                if lacks_embeddings(answer):
                    self.encoding.lost(job.parts)
                self._failed(job, pool, worker, answer)
        elif job.dropped:
            pass
        elif job.stage == "rolling":
            job.failed_on, job.overdue = None, False
            job.report = answer if job.item.plans else None
            job.weights.confirm(answer.fingerprint if job.item.plans else answer, worker)
            self._waits(job, "rolled")
        else:
            job.failed_on, job.result, job.stage = None, answer, "done"

    def _failed(self, job: Job, pool: Pool, worker: int, error: RayError) -> None:
        """Count the failure; go back to the start of the stage, or of the item if its rollout was lost too."""
        if isinstance(error, RayActorError):
            pool.down(worker)
        else:
            pool.suspect(worker)
        if job.dropped:
            return
        job.weights.check()
        if job.stage == "rolling" and object_lost(error):  # embeddings that are gone are another error
            raise LearnersLost(f"version {job.item.version.step} of the weights is gone with a node: {cause(error)}")
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
        self._waits(job, "queued" if job.stage == "rolling" or lost_rollout else "rolled")
