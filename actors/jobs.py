"""The items of the pipeline: their state, what is sent of them, and the answers that are read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import Ref
from actors.pool import Pool
from actors.transport import Published
from flowbp_ray.messages import Evaluated, Item, RolloutReport, Scored, ScoredItem


class Sent:
    """An argument of several calls, pickled once. It arrives as the value that it was made of.

    Ray pickles each argument of each call, and looks up every class in it in Python: 50 us for an item.
    """

    def __init__(self, value: Any) -> None:
        self.pickled = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self.pickled,)


@dataclass(eq=False)
class Job:
    """The state of an item. refs: the last rollout's results; pending: the reference that is waited for."""

    item: Item
    weights: Published
    number: int = 0  # in the order of submission
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
    called: float = 0.0  # when the pending call was made (time.monotonic)
    overdue: bool = False  # whether a worker of it was ended because it did not answer
    dropped: bool = False  # belongs to an earlier incarnation; its worker is still busy with it
    sent: Sent | None = None  # the item, from its first call on

    def argument(self) -> Sent:
        """The item as an argument of a call."""
        if self.sent is None:
            self.sent = Sent(self.item)
        return self.sent

    def scored(self) -> ScoredItem:
        """The result of a finished training item."""
        # refs[1] is the `Rollout`, the learner's part.
        assert self.report is not None and isinstance(self.result, Scored)
        return ScoredItem(self.item, self.report, self.result, self.refs[1], self.cotangent, self.pictures)


def answers(refs: Sequence[Ref]) -> list[Any]:
    """What these calls, which have ended, returned; for one that failed its RayError."""
    try:
        found: list[Any] = ray.get(list(refs))  # a quarter of the time that one `ray.get` for each takes
        return found
    except RayError:
        return [_answer(ref) for ref in refs]


def _answer(ref: Ref) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def end_overdue(jobs: Sequence[Job], pools: Sequence[Pool], since: float) -> list[str]:
    """End the workers whose calls were made before `since` and are still not answered; return their names.

    Ray starts them anew, and their calls fail and are made again elsewhere. A job for which that was done already is
    left alone: then it is not the worker.
    """
    late = [job for job in jobs if job.called <= since and not job.overdue]
    workers = {(pools[job.stage == "scoring"], job.worker) for job in late}
    for job in late:
        job.overdue = True
    for pool, worker in workers:
        if worker is not None:
            ray.kill(pool.handles[worker], no_restart=False)
    return sorted(f"{pool.name} {worker}" for pool, worker in workers)


def state_of(jobs: Sequence[Job], pools: Sequence[Pool]) -> dict[str, Any]:
    """The state of all items and actors, for `Stalled`; `summary` is one line."""
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job.stage] = counts.get(job.stage, 0) + 1
    down = {pool.name: pool.silent for pool in pools if pool.silent}
    busy = {pool.name: [i for i, load in enumerate(pool.load.tolist()) if load] for pool in pools if pool.load.any()}
    return {
        "summary": f"items {counts}, busy {busy or 'none'}, being started {down or 'none'}",
        "items": [
            {"purpose": j.item.purpose, "step": j.item.step, "index": j.item.index, "stage": j.stage}
            | {"worker": j.worker, "tries": j.tries, "dropped": j.dropped}
            for j in jobs
        ],
        "calls in flight": {pool.name: pool.load.tolist() for pool in pools},
        "do not answer": down,
    }
