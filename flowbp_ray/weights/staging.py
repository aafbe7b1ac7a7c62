"""Copies between a GPU and host memory through pinned buffers that are reused.

A copy from or to pageable memory is staged by the driver in small pieces while the host waits, and fresh memory costs a
page fault per 4 kB in addition. Here the host's side is page-locked once, copies are enqueued, and the host waits once
per bucket. On CPUs there is nothing to stage: weights are published from the memory they lie in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 64 * 2**20
"""Bytes of each of the two buffers of an upload: one is filled while the other is copied to the device."""


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Host memory [nbytes] uint8 for copies from and to `device`: page-locked for a GPU."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


class Mark:
    """A point in the queue of a device that the host can wait for; on CPUs it has passed already."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


class Download:
    """Copies arrays into one of `slots` host buffers, in turn. A buffer grows to the largest bucket and stays."""

    def __init__(self, slots: int = 2) -> None:
        self.buffers: list[Tensor | None] = [None] * slots
        self.turn = 0

    def start(self, arrays: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        """Enqueue the copies; return the host arrays [n] uint8, and the mark after which they hold the bytes.

        The host arrays are valid until `start` has been called as often again as there are slots. arrays: [n] uint8
        each, all on one device.
        """
        device = arrays[0].device
        self.turn = (self.turn + 1) % len(self.buffers)
        needed = sum(len(array) for array in arrays)
        buffer = self.buffers[self.turn]
        if buffer is None or len(buffer) < needed:
            buffer = self.buffers[self.turn] = host_buffer(needed, device)
        host, at = [], 0
        for array in arrays:
            host.append(buffer[at : at + len(array)])
            host[-1].copy_(array, non_blocking=True)
            at += len(array)
        return host, Mark(device)


class Upload:
    """Copies host memory to a device through two buffers of `chunk` bytes."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self.buffers: list[Tensor] = []
        self.marks: list[Mark] = []
        self.turn = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue the copy of `source` (host) into `target` (device), both [n] uint8. `source` is read at once."""
        if not self.buffers:
            self.buffers = [host_buffer(self.chunk, target.device) for _ in range(2)]
            self.marks = [Mark(target.device) for _ in range(2)]
        for at in range(0, len(source), self.chunk):
            part = source[at : at + self.chunk]
            self.turn = 1 - self.turn
            self.marks[self.turn].wait()  # until the device has read what the buffer held before
            buffer = self.buffers[self.turn][: len(part)]
            buffer.copy_(part)
            target[at : at + len(part)].copy_(buffer, non_blocking=True)
            self.marks[self.turn] = Mark(target.device)

    def finish(self) -> None:
        """Wait until the device has all bytes."""
        for mark in self.marks:
            mark.wait()
