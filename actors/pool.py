"""A pool of identical actors: who is free, who is down. Calls go to the least loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

DEPTH = 2  # calls in flight per actor: one running, one waiting, so that no actor idles for the driver's answer


class Pool:
    """Counts the calls in flight per actor. An actor that died is asked `ready` until Ray has restarted it.

    Actors keep their number: one that has left leaves a gap.
    """

    def __init__(self, name: str, handles: Sequence[Any]) -> None:
        self.name = name
        self.handles = list(handles)
        self.load = [0] * len(self.handles)
        self.asked: dict[int, Any] = {}
        self.leaving: set[int] = set()
        self.gone: set[int] = set()

    @property
    def staying(self) -> list[int]:
        """Numbers of the actors that neither have left nor are leaving."""
        return [i for i in range(len(self.handles)) if i not in self.leaving | self.gone]

    def join(self, handle: Any) -> int:
        """Count a new actor in; it gets work once it answers."""
        self.handles.append(handle)
        self.load.append(0)
        self.down(len(self.handles) - 1)
        return len(self.handles) - 1

    def leave(self) -> int:
        """Give the newest actor no more work."""
        last = self.staying[-1]
        self.leaving.add(last)
        return last

    def left(self) -> list[int]:
        """Those that were leaving and have nothing more to do: their processes may end."""
        done = [i for i in sorted(self.leaving) if self.load[i] == 0]
        self.leaving -= set(done)
        self.gone |= set(done)
        for index in done:
            self.asked.pop(index, None)
        return done

    def take(self, avoid: int | None = None) -> int | None:
        """The least loaded actor that is up, another than `avoid` where there is one; None if all are busy."""
        up = [i for i in self.staying if i not in self.asked and self.load[i] < DEPTH]
        choices = [i for i in up if i != avoid] or up
        if not choices:
            return None
        best = min(choices, key=lambda i: self.load[i])
        self.load[best] += 1
        return best

    def give(self, index: int) -> None:
        self.load[index] -= 1

    def down(self, index: int) -> None:
        """Leave this actor out until it answers again."""
        if index not in self.asked:
            self.asked[index] = self.handles[index].ready.remote()

    def recover(self) -> None:
        """Take back those that answer; ask those again whose answer failed."""
        for index, ref in list(self.asked.items()):
            if not ray.wait([ref], timeout=0)[0]:
                continue
            del self.asked[index]
            try:
                ray.get(ref)
            except RayError:
                self.asked[index] = self.handles[index].ready.remote()
