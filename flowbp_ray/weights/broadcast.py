"""Learner rank 0's side of a broadcast of weights: it calls samplers, forms a group of those that answer, and sends.

Each sampler has an `Inbox` with a thread of its own, so it answers while it rolls out. They meet in a key-value store
that rank 0 serves (torch's TCPStore). Broadcast n goes as follows; a seat is a sampler's name.

| key | written by | value |
|---|---|---|
| `call/<seat>/<k>` | rank 0 | JSON: n, of the k-th broadcast to which this seat is called, and `Blocks.digest` |
| `here/<n>/<seat>` | the sampler | OK, or why it cannot take part |
| `go/<n>` | rank 0 | JSON: the seats that take part, in rank order, the group's number and what is sent |
| `done/<n>/<seat>` | the sampler | OK once it has all bytes, or what went wrong |

Who is not there within PATIENCE seconds does not take part: only a process that dies during the transfer itself makes
the others wait for the deadline.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowbp_ray.weights.buckets import Blocks, Bucket
from flowbp_ray.weights.group import Group, GroupBroken, first_line, forget, own_address, serve_store

OK = "ok"
PATIENCE = 10.0  # seconds within which a sampler must answer a call
SLOWEST = 50e6  # bytes per second; a transfer may take as long as at this rate, and GRACE more
GRACE = 30.0  # seconds
LOOK = 1e-3  # seconds between two looks at the store
LATE = 16  # broadcasts after which no sampler still waits to be told whether it takes part


@dataclass(frozen=True)
class Delivery:
    """What became of a broadcast. seats: those that hold the weights now. error: "", or why the others do not.

    seconds: from the call to the last answer.
    """

    seats: tuple[str, ...]
    error: str = ""
    seconds: float = 0.0


def limits(blocks: Blocks, timeout: float) -> tuple[float, float]:
    """(patience, seconds) of a sender and its inboxes: how long a call and an array may take.

    timeout: seconds after which the run gives up a process that does not answer; both are well below it.
    """
    largest = max(blocks.size(bucket) for bucket in blocks.buckets)
    return min(PATIENCE, timeout / 6), min(GRACE + largest / SLOWEST, timeout / 3)


class Sender:
    """Serves the store, and broadcasts versions. Use: `call`, `send` for each array of `blocks`, then `finish`."""

    def __init__(self, address: str, blocks: Blocks, device: str, patience: float, seconds: float) -> None:
        """address: of this host, as the samplers reach it. patience, seconds: see `limits`."""
        self.address, self.blocks, self.device = address, blocks, torch.device(device)
        self.patience, self.seconds = patience, seconds
        self.store = serve_store(address, 0, self.seconds)
        self.port: int = self.store.port
        self.calls: dict[str, int] = {}
        self.called: tuple[str, ...] = ()
        self.number = self.groups = 0
        self.group: Group | None = None
        self.seats: tuple[str, ...] = ()  # of the group
        self.error = ""
        self.buffer: Tensor | None = None

    def call(self, seats: Sequence[str], what: Sequence[Any]) -> None:
        """Call the samplers, and form a group of those that answer. what: JSON that names what is sent."""
        self.number += 1
        self.called, self.error, n = tuple(seats), "", self.number
        for seat in seats:
            self.calls[seat] = self.calls.get(seat, -1) + 1
            self.store.set(f"call/{seat}/{self.calls[seat]}", json.dumps([n, self.blocks.digest]))
        answers = self._gather("here", seats, self.patience)
        present = tuple(seat for seat in seats if answers.get(seat) == OK)
        self._note(seats, answers)
        again = self.group is None or present != self.seats
        if again:
            self.close()
            forget(self.store, f"group/{self.groups}/")
            self.groups, self.seats = self.groups + 1, present
        go = {"seats": present, "group": self.groups, "what": list(what)}
        self.store.set(f"go/{n}", json.dumps(go))
        self.store.delete_key(f"go/{n - LATE}")
        if again and present:
            try:
                store = dist.PrefixStore(f"group/{self.groups}", self.store)
                here = own_address(self.address)
                self.group = Group(store, 0, 1 + len(present), self.device, here, self.seconds)
            except GroupBroken as error:
                self._fail(error)

    def send(self, array: Tensor) -> None:
        """Broadcast a bucket's array, in the order of `blocks`. After a failure it does nothing."""
        if self.group is None:
            return
        try:
            self.group.broadcast(array)
        except GroupBroken as error:
            self._fail(error)

    def finish(self) -> Delivery:
        """Wait until all samplers have said what they got."""
        took_part = self.seats if self.group is not None else ()
        answers = self._gather("done", took_part, self.seconds)
        self._note(took_part, answers)
        arrived = tuple(seat for seat in took_part if answers.get(seat) == OK)
        if arrived != took_part:
            self.close()
        for seat in self.called:
            for kind in ("here", "done"):
                self.store.delete_key(f"{kind}/{self.number}/{seat}")
        return Delivery(arrived, self.error)

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
        self.group, self.seats = None, ()

    def _gather(self, kind: str, seats: Iterable[str], seconds: float) -> dict[str, str]:
        """The answers of the seats that come within `seconds`; after a bad one the others have PATIENCE left."""
        until = time.monotonic() + seconds
        waiting, answers = list(seats), {}
        while waiting:
            for seat in list(waiting):
                key = f"{kind}/{self.number}/{seat}"
                if self.store.check([key]):
                    answers[seat] = self.store.get(key).decode()
                    waiting.remove(seat)
                    if answers[seat] != OK:
                        until = min(until, time.monotonic() + self.patience)
            if not waiting or time.monotonic() > until:
                break
            time.sleep(LOOK)
        return answers

    def _note(self, seats: Iterable[str], answers: Mapping[str, str]) -> None:
        """Keep the first reason for which a seat does not get the weights."""
        for seat in seats:
            if answers.get(seat) != OK:
                self.error = self.error or f"{seat}: {answers.get(seat, 'no answer')}"

    def _fail(self, error: GroupBroken) -> None:
        self.error = self.error or first_line(error)
        self.close()

    def array(self, bucket: Bucket, tensors: Mapping[str, Tensor]) -> Tensor:
        """The bucket as one array [bytes] uint8: the memory it lies in, or else a copy in a buffer that is reused."""
        held = lying(bucket, tensors, self.blocks)
        if held is not None:
            return held
        size = self.blocks.size(bucket)
        if self.buffer is None or len(self.buffer) < size:
            self.buffer = torch.zeros(size, dtype=torch.uint8, device=self.device)
        starts, _ = self.blocks.offsets(bucket)
        for name, start in starts.items():
            tensor = tensors[name]
            place = self.buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor)
        return self.buffer[:size]


def lying(bucket: Bucket, tensors: Mapping[str, Tensor], blocks: Blocks) -> Tensor | None:
    """The bucket's array [bytes] uint8 as a view of its tensors' memory, if they lie in it as `blocks` says."""
    starts, total = blocks.offsets(bucket)
    first = tensors[bucket.names[0]]
    storage, base = first.untyped_storage(), first.data_ptr()
    for name, start in starts.items():
        tensor = tensors[name]
        apart = tensor.untyped_storage().data_ptr() != storage.data_ptr() or not tensor.is_contiguous()
        if apart or tensor.data_ptr() != base + start:
            return None
    at = base - storage.data_ptr()
    if at + total > storage.nbytes():
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage)  # type: ignore[call-overload]
    return whole[at : at + total]
