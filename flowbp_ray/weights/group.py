"""A process group of one broadcast, made by hand: NCCL between GPUs, gloo between CPUs.

It is apart from torch's default group, which the learners have for ZeRO, and has nothing global: a process may leave
one and enter the next, in any order, which `torch.distributed.new_group` does not allow for processes outside the
default group. Every operation has a deadline, after which the group is useless and must be replaced.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

POLL = 5e-5  # seconds between two looks at an operation on a GPU
HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
WATCHDOG = 3600.0  # seconds that NCCL's own watchdog adds to a deadline: ours comes first


class GroupBroken(RuntimeError):
    """A process of the group died or did not answer in time, or the group could not be made."""


class Group:
    """Process `rank` of `size`, of which rank 0 sends. Making it needs all of them at the same time."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, here: str, seconds: float) -> None:
        """store: of torch.distributed, the same for all and used by no other group. here: this host's address, by which
        the others reach it. seconds: the deadline of an operation.

        Raises GroupBroken if the others do not come in time.
        """
        self.device, self.seconds, self.made = device, seconds, False
        try:
            self.backend = (
                nccl(store, rank, size, seconds) if device.type == "cuda" else gloo(store, rank, size, here, seconds)
            )
        except RuntimeError as error:
            raise GroupBroken(f"the group of {size} could not be made: {first_line(error)}") from error

    def broadcast(self, array: Tensor) -> None:
        """Send `array` from rank 0, or receive it, [n] uint8 of any length; return once this process has done its part.

        Raises GroupBroken if it fails or takes longer than the deadline. The array's bytes are then undefined.
        """
        if not len(array):
            return
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._wait(self._started(array, options))
        except RuntimeError as error:
            raise GroupBroken(first_line(error)) from error

    def _started(self, array: Tensor, options: Any) -> Any:
        """The operation, under way. The group's first one is started in a thread.

        NCCL makes its communicator there and blocks until all processes have come, which no deadline of its own ends.
        A thread that still blocks is left behind, and `close` gives the communicator up.
        """
        if self.made:
            return self.backend.broadcast([array], options)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        found: list[Any] = []

        def start() -> None:
            try:
                with torch.cuda.stream(stream):
                    found.append(self.backend.broadcast([array], options))
            except RuntimeError as error:
                found.append(error)

        thread = threading.Thread(target=start, name="first broadcast", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if not found:
            raise RuntimeError(f"the others did not come within {self.seconds:g} s")
        if isinstance(found[0], RuntimeError):
            raise found[0]
        self.made = True
        return found[0]

    def _wait(self, work: Any) -> None:
        if self.device.type == "cuda":  # there `wait` would only enqueue
            until = time.monotonic() + self.seconds
            while not work.is_completed():
                if time.monotonic() > until:
                    raise RuntimeError(f"not done within {self.seconds:g} s")
                time.sleep(POLL)
        work.wait()

    def close(self) -> None:
        """Give up what is under way, and the connections."""
        with suppress(RuntimeError):  # it is broken anyway
            self.backend.abort()


def gloo(store: Any, rank: int, size: int, here: str, seconds: float) -> Any:
    """A group on the interface that GLOO_SOCKET_IFNAME names, or else on that of `here`.

    By default gloo uses the address of the host's name: 127.0.1.1 on Debian, which no other host reaches.
    """
    kind: Any = dist.ProcessGroupGloo  # whose stub lacks the options
    options = kind._Options()
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    device = {"interface": named} if named else {"hostname": here}
    options._devices = [kind.create_device(**device)]
    options._timeout = timedelta(seconds=seconds)
    return kind(store, rank, size, options)


def nccl(store: Any, rank: int, size: int, seconds: float) -> Any:
    """A group whose failure does not end this process, as torch's watchdog would by default (modes 1 and 3)."""
    if not dist.is_nccl_available():
        raise RuntimeError("this torch was built without NCCL")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=seconds + WATCHDOG)
    with environment(HANDLING, "2"):  # abort the communicator only
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def serve_store(address: str, port: int, seconds: float, shared: bool = False) -> Any:
    """A TCPStore that listens at `address` of this host alone; by itself torch's listens on all interfaces.

    port: 0 for a free one. seconds: its timeout. shared: later stores of this process at this port are the same one.
    Where `address` is none of this host's own (network address translation) it does listen on all.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            listening.close()
            raise
        listening.bind(("", port))
    port = listening.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        multi_tenant=shared,
        master_listen_fd=listening.detach(),
    )


def own_address(towards: str) -> str:
    """The address of this host from which it reaches `towards`, which may be an address of its own."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        return str(probe.getsockname()[0])


def forget(store: Any, prefix: str) -> None:
    """Delete the keys of a TCPStore that begin so: what a group's processes told each other. Old torch cannot list."""
    for key in store.list_keys() if hasattr(store, "list_keys") else ():
        if key.startswith(prefix):
            store.delete_key(key)


def first_line(error: Exception) -> str:
    """The first line of a message; torch appends the stack of its C++ code."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
