"""A sampler's side of a broadcast of weights: a thread that takes part, and the versions that have arrived.

With staleness 0 no item is in progress when a version is published, so it is received into the parameters themselves.
With staleness S items of older versions may still have to be rolled out: a version is received into one of S spare
copies of the weights, beside the items, and copied into the parameters when an item names it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowbp_ray.messages import Version
from flowbp_ray.weights.broadcast import GRACE, OK, PATIENCE
from flowbp_ray.weights.group import Group, first_line, own_address
from flowbp_ray.weights.packing import Receiver

IDLE = timedelta(minutes=10)  # after which the thread looks whether it is still needed


class Inbox:
    """Receives versions into a module's parameters or beside them, in a thread."""

    def __init__(
        self,
        receiver: Receiver,
        address: str,
        port: int,
        seat: str,
        busy: threading.Lock,
        spare: int = 0,
        overwritten: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
        seconds: float = GRACE,
    ) -> None:
        """address, port: of the sender's store. seat: this sampler's name there. spare: copies of the weights.

        busy: held by whoever reads or writes the parameters, and while a version is received into them; `install` and
        `forget` are called by who holds it.

        overwritten: called before a version is received into the parameters, which then hold no valid version.
        patience, seconds: the sender's.
        """
        self.receiver, self.seat, self.spare, self.overwritten = receiver, seat, spare, overwritten
        self.blocks, self.arrays = receiver.lay_out()
        self.device = self.arrays[0].device
        self.patience, self.seconds = patience, seconds
        self.busy, self.mutex = busy, threading.Lock()
        self.arrived: dict[Version, list[Tensor]] = {}  # in the order of arrival
        self.free: list[list[Tensor]] = []
        self.copies = 0  # spare copies that have been allocated
        self.stream: Any = None
        self.group: Group | None = None
        self.number = -1  # of the group
        self.closed = False
        self.address = address
        self.store: Any = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self.seconds))
        self.thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self.thread.start()

    def install(self, version: Version) -> bool:
        """Make `version` the content of the parameters; return False if it has not arrived or is gone."""
        with self.mutex:
            held = self.arrived.pop(version, None)
            if held is None:
                return False
            if held is not self.arrays:
                for mine, array in zip(self.arrays, held, strict=True):
                    mine.copy_(array)
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                self.free.append(held)
            return True

    def forget(self) -> None:
        """Note that something else has been written into the parameters."""
        with self.mutex:
            self.arrived = {version: held for version, held in self.arrived.items() if held is not self.arrays}

    def close(self) -> None:
        """Take part in nothing more. The thread ends with its next call, or with the sender."""
        self.closed = True
        with self.mutex:
            self.arrived, self.free = {}, []

    def _run(self) -> None:
        calls = 0
        while not self.closed:
            try:
                call = self._called(calls)
                if call is not None:
                    calls += 1
                    self._answer(*call)
            except RuntimeError:  # the sender is gone
                break
        self._leave()

    def _called(self, calls: int) -> tuple[int, str] | None:
        """The next broadcast to which this seat is called, and the sender's blocks; None if there was none in IDLE."""
        key = f"call/{self.seat}/{calls}"
        try:
            self.store.wait([key], IDLE)
        except dist.DistStoreError:
            return None
        number, blocks = json.loads(self.store.get(key))
        self.store.delete_key(key)
        return number, blocks

    def _answer(self, number: int, blocks: str) -> None:
        """Take part in a broadcast, if the parameters are free and the sender takes this seat in."""
        if blocks != self.blocks.digest:
            self.store.set(f"here/{number}/{self.seat}", "its weights have other names or sizes than the learners'")
            return
        in_place = self.spare == 0
        if in_place and not self.busy.acquire(timeout=0.8 * self.patience):  # so that the answer comes in time
            self.store.set(f"here/{number}/{self.seat}", "busy with an item")
            return
        try:
            self.store.set(f"here/{number}/{self.seat}", OK)
            self.store.wait([f"go/{number}"], timedelta(seconds=2 * self.patience))
            go = json.loads(self.store.get(f"go/{number}"))
            if self.seat in go["seats"] and not self.closed:
                self.store.set(f"done/{number}/{self.seat}", self._take(go))
            else:
                self._leave()
        except dist.DistStoreError:  # nobody said go
            self._leave()
        finally:
            if in_place:
                self.busy.release()

    def _take(self, go: dict[str, Any]) -> str:
        """Receive a version; return OK or what went wrong."""
        version, held = Version(*go["what"]), None
        try:
            self._join(go["group"], go["seats"])
            assert self.group is not None
            with self._own_stream():
                held = self._place(version)
                for array in held:
                    self.group.broadcast(array)
        except RuntimeError as error:  # GroupBroken, or no memory for a spare copy
            self._leave()
            if held is not None and held is not self.arrays:
                with self.mutex:
                    self.free.append(held)
            return first_line(error)
        with self.mutex:
            if not self.closed:
                self.arrived[version] = held
        return OK

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """On a GPU, run the context on a stream beside the one that rolls out."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            self.stream = self.stream or torch.cuda.Stream(self.device)
            if self.spare == 0:  # the last item may still read the parameters
                torch.cuda.synchronize(self.device)
            with torch.cuda.stream(self.stream):
                yield
            self.stream.synchronize()

    def _join(self, number: int, seats: Sequence[str]) -> None:
        if self.group is not None and self.number == number:
            return
        self._leave()
        store = dist.PrefixStore(f"group/{number}", self.store)
        here, rank = own_address(self.address), 1 + seats.index(self.seat)
        self.group = Group(store, rank, 1 + len(seats), self.device, here, self.seconds)
        self.number = number

    def _leave(self) -> None:
        if self.group is not None:
            self.group.close()
        self.group = None

    def _place(self, version: Version) -> list[Tensor]:
        """The arrays to receive into: the parameters' own, or a spare copy, of which the oldest version may have to go.

        A version that is being received has left `arrived`, so that `install` cannot return half of it.
        """
        with self.mutex:
            held = self.arrived.pop(version, None)
            if self.spare == 0:
                self.arrived = {}
                self.overwritten()
                return self.arrays
            if held is not None:
                return held
            if self.free:
                return self.free.pop()
            if self.copies < self.spare:
                copy = [torch.empty_like(array) for array in self.arrays]
                self.copies += 1  # only now: there may be no memory for it
                return copy
            return self.arrived.pop(next(iter(self.arrived)))
