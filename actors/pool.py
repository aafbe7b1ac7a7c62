"""A pool of identical actors: tracks which are free, down or suspected, and gives calls to the least loaded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from actors.errors import Ref
from flowbp_ray.utils.settings import MAX_CALLS_IN_FLIGHT


class Pool:
    """Counts the calls in flight per actor, and probes actors that failed by calling their `ready`.

    down: the process died; the actor gets no call until Ray has restarted it. suspected: a call failed, perhaps because
    a service that the actor uses is away; it gets calls only while no other actor is well.
    """

    def __init__(self, name: str, handles: Sequence[Any], places: Sequence[Hashable] | None = None) -> None:
        """places: what each actor depends on, such as a server's address; those of one place are suspected together."""
        self.name = name
        self.handles = list(handles)
        self.places = list(range(len(self.handles)) if places is None else places)
        self.load = np.zeros(len(self.handles), np.int64)
        self.probing: dict[int, Ref] = {}  # actor that is down or suspected -> its pending `ready` call
        self.suspected: set[int] = set()
        self.active = list(range(len(self.handles)))  # indices of active actors; indices are never reused
        self.leaving: set[int] = set()
        self.retired: set[int] = set()
        self.new: set[int] = set()  # not ready yet since they joined
        self.failed: dict[int, RayError] = {}  # new actors whose constructor failed
        self.deaths = [0] * len(self.handles)  # how often each was marked as down: what its process knew is lost
        self._well: np.ndarray | None = None  # the actors that get calls; None: to be found again

    @property
    def silent(self) -> list[int]:
        """The actors that are probed and have not answered yet."""
        return sorted(self.probing)

    @property
    def serving(self) -> list[int]:
        """The active actors that have been ready at least once."""
        return [i for i in self.active if i not in self.new]

    def join(self, handle: Any, place: Hashable) -> None:
        """Add a new actor; it gets calls once it is ready."""
        self.handles.append(handle)
        self.places.append(place)
        self.load = np.append(self.load, 0)
        self.deaths.append(0)
        self.active.append(len(self.handles) - 1)
        self._well = None
        self.new.add(len(self.handles) - 1)
        self.down(len(self.handles) - 1)

    def leave(self, index: int | None = None) -> None:
        """Give an actor no more calls: `index`, or the last one that is new, else probed, else the newest one."""
        idle = [i for i in self.active if i in self.new] or [i for i in self.active if i in self.probing]
        chosen = (idle or self.active)[-1] if index is None else index
        self.active.remove(chosen)
        self._well = None
        self.leaving.add(chosen)

    def left(self) -> list[int]:
        """Retire the leaving actors without a call in flight, and return them; their processes can be ended."""
        done = [i for i in sorted(self.leaving) if self.load[i] == 0]
        self.leaving -= set(done)
        self.retired |= set(done)
        for index in done:
            self.probing.pop(index, None)
            self.suspected.discard(index)
            self.new.discard(index)
        return done

    def acquire(self, avoid: int | None = None) -> int | None:
        """Take the least loaded actor that is neither down nor suspected; None if all of these are busy.

        avoid: the actor that failed. If there are actors at other places than its own, only these are considered, so
        the result is None while they are busy. If all actors are suspected, suspected ones are used.
        """
        best = self.choose(avoid)
        if best is not None:
            self.assign(best)
        return best

    def choose(self, avoid: int | None = None) -> int | None:
        """The actor that `acquire` would take."""
        if self._well is None:
            up = [i for i in self.active if i not in self.probing or i in self.suspected]
            self._well = np.array([i for i in up if i not in self.suspected] or up, np.int64)
        if avoid is None and len(self._well):  # the usual case, without a Python loop over thousands of actors
            best = int(self._well[self.load[self._well].argmin()])
            return best if self.load[best] < MAX_CALLS_IN_FLIGHT else None
        well: list[int] = self._well.tolist()
        elsewhere = [i for i in well if avoid is None or self.places[i] != self.places[avoid]] or well
        choices = [i for i in elsewhere if self.load[i] < MAX_CALLS_IN_FLIGHT]
        return min(choices, key=lambda i: (i == avoid, self.load[i]), default=None)

    def assign(self, index: int) -> None:
        """Note a call of this actor."""
        self.load[index] += 1

    def release(self, index: int) -> None:
        self.load[index] -= 1

    def down(self, index: int) -> None:
        """Mark an actor as down until it is ready again."""
        self.deaths[index] += 1
        self._well = None
        self.suspected.discard(index)
        self._probe(index)

    def suspect(self, index: int) -> None:
        """Mark the actors at this one's place as suspected until they are ready, if there are other places."""
        if len({self.places[i] for i in self.active}) == 1:
            return
        for i in self.active:
            if self.places[i] == self.places[index] and i not in self.probing:
                self.suspected.add(i)
                self._well = None
                self._probe(i)

    def recover(self) -> None:
        """Take back the actors that are ready; probe those again whose probe failed."""
        for index, ref in list(self.probing.items()):
            if not ray.wait([ref], timeout=0)[0]:
                continue
            del self.probing[index]
            self._well = None
            try:
                ray.get(ref)
            except RayError as error:
                if isinstance(error, RayActorError):
                    self.suspected.discard(index)
                if isinstance(error, RayActorError) and index in self.new:
                    self.failed[index] = error  # Ray does not restart an actor whose constructor failed
                else:
                    self._probe(index)
            else:
                self.suspected.discard(index)
                self.new.discard(index)

    def _probe(self, index: int) -> None:
        if index not in self.probing:
            self.probing[index] = self.handles[index].ready.remote()
