"""A pool of identical actors: who is free, who is down, who is suspected. Calls go to the least loaded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from flowbp_ray.utils.settings import MAX_CALLS_IN_FLIGHT


class Pool:
    """Counts the calls in flight per actor, and asks those that failed whether they are `ready` again.

    down: its process died; it gets nothing until Ray has restarted it. suspected: its call failed, perhaps because what
    it asks elsewhere is away; it gets something only where every actor is suspected.
    """

    def __init__(self, name: str, handles: Sequence[Any], places: Sequence[Hashable] | None = None) -> None:
        """places: what each actor depends on, such as an address; actors of one place are suspected together."""
        self.name = name
        self.handles = list(handles)
        self.places = list(range(len(self.handles)) if places is None else places)
        self.load = [0] * len(self.handles)
        self.probing: dict[int, Any] = {}  # those that are down or suspected -> the answer that is waited for
        self.suspected: set[int] = set()
        self.active = list(range(len(self.handles)))  # indices of active actors; indices are never reused
        self.leaving: set[int] = set()
        self.retired: set[int] = set()
        self.new: set[int] = set()  # have not been ready yet
        self.failed: dict[int, RayError] = {}  # new ones whose process could not be built

    @property
    def silent(self) -> list[int]:
        """Those that have not said that they are ready again."""
        return sorted(self.probing)

    @property
    def serving(self) -> list[int]:
        """Those of `active` that have been ready."""
        return [i for i in self.active if i not in self.new]

    def join(self, handle: Any, place: Hashable) -> None:
        """Count a new actor in; it gets work once it answers."""
        self.handles.append(handle)
        self.places.append(place)
        self.load.append(0)
        self.active.append(len(self.handles) - 1)
        self.new.add(len(self.handles) - 1)
        self.down(len(self.handles) - 1)

    def leave(self, index: int | None = None) -> None:
        """Give this actor no more work; else one that has none, because it is new or down; else the newest."""
        idle = [i for i in self.active if i in self.new] or [i for i in self.active if i in self.probing]
        chosen = (idle or self.active)[-1] if index is None else index
        self.active.remove(chosen)
        self.leaving.add(chosen)

    def left(self) -> list[int]:
        """Those that were leaving and have nothing more to do: their processes may end."""
        done = [i for i in sorted(self.leaving) if self.load[i] == 0]
        self.leaving -= set(done)
        self.retired |= set(done)
        for index in done:
            self.probing.pop(index, None)
            self.suspected.discard(index)
            self.new.discard(index)
        return done

    def acquire(self, avoid: int | None = None) -> int | None:
        """The least loaded actor that is well, at another place than `avoid` where there is one; None if all are busy.

        Another one that is busy is waited for.
        """
        if avoid is None and not self.probing:  # nearly always: no loop over thousands
            whole = len(self.active) == len(self.load)
            best = self.load.index(min(self.load)) if whole else min(self.active, key=self.load.__getitem__)
            return self._assign(best) if self.load[best] < MAX_CALLS_IN_FLIGHT else None
        up = [i for i in self.active if i not in self.probing or i in self.suspected]
        well = [i for i in up if i not in self.suspected] or up
        elsewhere = [i for i in well if avoid is None or self.places[i] != self.places[avoid]] or well
        choices = [i for i in elsewhere if self.load[i] < MAX_CALLS_IN_FLIGHT]
        if not choices:
            return None
        return self._assign(min(choices, key=lambda i: (i == avoid, self.load[i])))

    def _assign(self, index: int) -> int:
        self.load[index] += 1
        return index

    def release(self, index: int) -> None:
        self.load[index] -= 1

    def down(self, index: int) -> None:
        """Leave this actor out until it answers again."""
        self.suspected.discard(index)
        self._probe(index)

    def suspect(self, index: int) -> None:
        """Prefer actors of other places, if any, to this one's until they say that they are ready."""
        if len({self.places[i] for i in self.active}) == 1:
            return
        for i in self.active:
            if self.places[i] == self.places[index] and i not in self.probing:
                self.suspected.add(i)
                self._probe(i)

    def recover(self) -> None:
        """Take back those that answer; ask those again whose answer failed."""
        for index, ref in list(self.probing.items()):
            if not ray.wait([ref], timeout=0)[0]:
                continue
            del self.probing[index]
            try:
                ray.get(ref)
            except RayError as error:
                if isinstance(error, RayActorError):
                    self.suspected.discard(index)
                if isinstance(error, RayActorError) and index in self.new:
                    self.failed[index] = error  # Ray does not try again where a constructor failed
                else:
                    self._probe(index)
            else:
                self.suspected.discard(index)
                self.new.discard(index)

    def _probe(self, index: int) -> None:
        if index not in self.probing:
            self.probing[index] = self.handles[index].ready.remote()
