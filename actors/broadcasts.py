"""The driver's side of broadcasts of weights: which samplers take part, and which of them have what was sent.

The driver moves nothing. A sampler takes its seat once (`SamplerActor.sit`); rank 0 then calls it by name, through a
store that rank 0 serves (`flowbp_ray.weights.broadcast`), and not through Ray. So a broadcast does not queue behind the
items that a sampler has in flight, and a dead sampler cannot hold up more than its own seat.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import Ref, cause
from actors.pool import Pool
from flowbp_ray.messages import Version
from flowbp_ray.weights.broadcast import PATIENCE, Delivery


@dataclass
class Seat:
    """A sampler's place in broadcasts. deaths: of its actor before. taken: the pending call in which it sits down."""

    name: str
    deaths: int
    taken: Ref | None


class Broadcasts:
    """The seats of a pool of samplers; taken anew after a restart, and when the pool or the learners change."""

    def __init__(self, samplers: Pool, staleness: int, timeout: float) -> None:
        """staleness: samplers keep so many versions beside the one in use. timeout: cluster.stall_timeout."""
        self.samplers, self.staleness, self.timeout = samplers, staleness, timeout
        self.kept = staleness + 1 if staleness else 0  # versions of which rank 0 keeps a copy
        self.opened: tuple[str, int, int] | None = None  # rank 0's address, its port, and the number of its buckets
        self.seats: dict[int, Seat] = {}  # by the sampler's index in the pool
        self.called: tuple[str, ...] = ()
        self.numbers = count()
        self.log = logging.getLogger(__name__)

    def forget(self) -> None:
        """Note that the learners end: the next ones have another store."""
        self.opened, self.seats = None, {}

    def send(self, learners: Sequence[Any], version: Version) -> list[Ref]:
        """Call `broadcast` of all ranks; return the references to their answers, of which rank 0's is a `Delivery`."""
        self._seat_all()
        self.called = tuple(seat.name for seat in self.seats.values() if seat.taken is None)
        return [rank.broadcast.remote(version, self.called) for rank in learners]

    def landed(self, version: Version, delivery: Delivery) -> set[int]:
        """Log what went wrong, unseat who did not receive the version, and return the samplers that did."""
        holders = {index for index, seat in self.seats.items() if seat.name in delivery.seats}
        if missed := set(self.called) - set(delivery.seats):
            self.log.warning(
                "version %d by broadcast: %d of %d samplers have it (%s); the others take it from the object store",
                version.step,
                len(holders),
                len(self.called),
                delivery.error,
            )
            self.seats = {index: seat for index, seat in self.seats.items() if seat.name not in missed}
        return holders

    def store_kept(self, rank: Any, version: Version) -> tuple[list[Ref], list[Ref]]:
        """Have rank 0 store its copy of a version; return references to the buckets, and to its answer."""
        assert self.opened is not None
        *buckets, answer = rank.publish_kept.options(num_returns=self.opened[2] + 1).remote(version)
        return buckets, [answer]

    def _seat_all(self) -> None:
        """Offer seats to samplers without one. Wait for them only if nobody sits yet: they may be busy with items."""
        pool = self.samplers
        well = [index for index in pool.active if index not in pool.probing]
        self.seats = {i: seat for i, seat in self.seats.items() if i in well and seat.deaths == pool.deaths[i]}
        assert self.opened is not None
        address, port, _ = self.opened
        for index in well:
            if index not in self.seats:
                name = f"sampler {index} ({next(self.numbers)})"
                taken = pool.handles[index].sit.remote(address, port, name, self.staleness, self.timeout)
                self.seats[index] = Seat(name, pool.deaths[index], taken)
        waiting = [seat.taken for seat in self.seats.values() if seat.taken is not None]
        if waiting:
            nobody = len(waiting) == len(self.seats)
            limit = min(PATIENCE, self.timeout / 6) if nobody else 0.0
            ray.wait(waiting, num_returns=len(waiting), timeout=limit)
        for index, seat in list(self.seats.items()):
            self._see(index, seat)

    def _see(self, index: int, seat: Seat) -> None:
        """Look whether a sampler sits now; take the seat of one that cannot."""
        if seat.taken is None or not ray.wait([seat.taken], timeout=0)[0]:
            return
        try:
            ray.get(seat.taken)
            seat.taken = None
        except RayError as error:
            self.log.warning("sampler %d takes no part in broadcasts: %s", index, cause(error))
            del self.seats[index]
