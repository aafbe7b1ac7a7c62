"""The items of the pipeline: their state, what is sent of them, and the answers that are read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import Ref
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
