"""Which actor gets the next call, against a search over all of them; and what is sent of an item."""

from __future__ import annotations

import pickle
import random
from typing import Any

from ray import cloudpickle

from actors.jobs import Sent
from actors.learner_group import named
from actors.pool import Pool
from flowbp_ray.messages import Item, Version
from flowbp_ray.utils.settings import MAX_CALLS_IN_FLIGHT


class Well:
    """An actor that is asked whether it is ready, and never says so."""

    class ready:
        @staticmethod
        def remote() -> str:
            return "pending"


def searched(pool: Pool) -> int | None:
    """The first of the least loaded active actors that are not probed, by looking at each."""
    free = [i for i in pool.active if i not in pool.probing and pool.load[i] < MAX_CALLS_IN_FLIGHT]
    return min(free, key=lambda i: (pool.load[i], i)) if free else None


def test_the_least_loaded_actor_whatever_happens_to_the_pool() -> None:
    draw, handles = random.Random(0), [Well() for _ in range(7)]
    pool: Any = Pool("sampler", handles)
    in_flight: list[int] = []
    for _ in range(600):
        what = draw.random()
        if what < 0.55:
            expected = searched(pool)
            assert pool.choose() == expected == pool.acquire()
            in_flight += [] if expected is None else [expected]
        elif what < 0.9 and in_flight:
            pool.release(in_flight.pop(draw.randrange(len(in_flight))))
        elif what < 0.92 and len(pool.active) - len(pool.probing) > 2:
            pool.down(draw.choice([i for i in pool.active if i not in pool.probing]))
        elif what < 0.94:
            pool.join(Well(), len(pool.handles))
        elif what < 0.95 and len(pool.active) > 4:
            pool.leave()
    assert len(pool.handles) > 7 and pool.leaving and pool.silent
    assert pool.load.sum() == len(in_flight)


def test_an_item_is_pickled_once_and_arrives_as_itself() -> None:
    item = Item("train", 3, 1, (4, 5), (2, 3), (), 7, 25, 3.5, Version(0, 2))
    sent = Sent(item)
    assert pickle.loads(cloudpickle.dumps(sent)) == item == pickle.loads(cloudpickle.dumps([sent]))[0]


def test_many_ranks_are_named_by_the_first() -> None:
    assert named([3]) == "3" and named(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert named(range(2, 1026)) == "2, 3, 4, 5, 6, 7, 8, 9 and 1016 others"
