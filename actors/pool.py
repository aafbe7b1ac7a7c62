"""A pool of identical actors: who is free, who is down, who is doubted. Calls go to the least loaded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

DEPTH = 2  # calls in flight per actor: one running, one waiting, so that no actor idles for the driver's answer


class Pool:
    """Counts the calls in flight per actor, and asks those that failed whether they are `ready` again.

    down: its process died; it gets nothing until Ray has restarted it. doubted: its call failed, perhaps because what
    it asks elsewhere is away; it gets something only where every actor is doubted.
    """

    def __init__(self, name: str, handles: Sequence[Any], places: Sequence[Hashable] | None = None) -> None:
        """places: what each actor depends on, such as an address; actors of one place are doubted together."""
        self.name = name
        self.handles = list(handles)
        self.places = list(range(len(self.handles)) if places is None else places)
        self.load = [0] * len(self.handles)
        self.asked: dict[int, Any] = {}  # those that are down or doubted -> the answer that is waited for
        self.doubted: set[int] = set()
        self.leaving: set[int] = set()
        self.gone: set[int] = set()

    @property
    def silent(self) -> list[int]:
        """Those that have not said that they are ready again."""
        return sorted(self.asked)

    @property
    def staying(self) -> list[int]:
        """Numbers of the actors that neither have left nor are leaving. One that has left leaves a gap."""
        return [i for i in range(len(self.handles)) if i not in self.leaving | self.gone]

    def join(self, handle: Any, place: Hashable) -> None:
        """Count a new actor in; it gets work once it answers."""
        self.handles.append(handle)
        self.places.append(place)
        self.load.append(0)
        self.down(len(self.handles) - 1)

    def leave(self) -> None:
        """Give the newest actor no more work."""
        self.leaving.add(self.staying[-1])

    def left(self) -> list[int]:
        """Those that were leaving and have nothing more to do: their processes may end."""
        done = [i for i in sorted(self.leaving) if self.load[i] == 0]
        self.leaving -= set(done)
        self.gone |= set(done)
        for index in done:
            self.asked.pop(index, None)
            self.doubted.discard(index)
        return done

    def take(self, avoid: int | None = None) -> int | None:
        """The least loaded actor that is well, at another place than `avoid` where there is one; None if all are busy.

        Another one that is busy is waited for.
        """
        if avoid is None and not (self.asked or self.leaving or self.gone):  # nearly always: no loop over thousands
            least = min(self.load)
            return self._give_to(self.load.index(least)) if least < DEPTH else None
        up = [i for i in self.staying if i not in self.asked or i in self.doubted]
        well = [i for i in up if i not in self.doubted] or up
        elsewhere = [i for i in well if avoid is None or self.places[i] != self.places[avoid]] or well
        choices = [i for i in elsewhere if self.load[i] < DEPTH]
        if not choices:
            return None
        return self._give_to(min(choices, key=lambda i: (i == avoid, self.load[i])))

    def _give_to(self, index: int) -> int:
        self.load[index] += 1
        return index

    def give(self, index: int) -> None:
        self.load[index] -= 1

    def down(self, index: int) -> None:
        """Leave this actor out until it answers again."""
        self.doubted.discard(index)
        self._ask(index)

    def doubt(self, index: int) -> None:
        """Prefer actors of other places, if any, to this one's until they say that they are ready."""
        if len({self.places[i] for i in self.staying}) == 1:
            return
        for i in self.staying:
            if self.places[i] == self.places[index] and i not in self.asked:
                self.doubted.add(i)
                self._ask(i)

    def recover(self) -> None:
        """Take back those that answer; ask those again whose answer failed."""
        for index, ref in list(self.asked.items()):
            if not ray.wait([ref], timeout=0)[0]:
                continue
            del self.asked[index]
            try:
                ray.get(ref)
            except RayError as error:
                if isinstance(error, RayActorError):
                    self.doubted.discard(index)
                self._ask(index)
            else:
                self.doubted.discard(index)

    def _ask(self, index: int) -> None:
        if index not in self.asked:
            self.asked[index] = self.handles[index].ready.remote()
