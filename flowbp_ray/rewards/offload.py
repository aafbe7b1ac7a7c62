"""Models that wait in host memory between the calls that need them, so that other processes may use their GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Offloaded:
    """Frozen models, held in host memory (pinned where the device is a GPU) and on the device inside `here`.

    Entering copies them to the device; leaving copies nothing, as they do not change. The values are the same bits.
    """

    def __init__(self, holders: Iterable[Any], device: str) -> None:
        """holders: objects whose modules are taken, wherever in their attributes or closures these are."""
        self.device = device
        found = {id(t): t for module in modules_of(holders) for t in [*module.parameters(), *module.buffers()]}
        self.waiting: list[tuple[Tensor, Tensor]] = [(tensor, self._on_host(tensor)) for tensor in found.values()]
        self._leave()

    def _on_host(self, tensor: Tensor) -> Tensor:
        host = tensor.detach().cpu()
        return host if self.device == "cpu" else host.pin_memory()

    @contextmanager
    def here(self) -> Iterator[None]:
        """The models are on the device inside the context. Results of theirs that are kept must not need them later."""
        for tensor, host in self.waiting:
            tensor.data = torch.empty_like(host, device=self.device).copy_(host, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for tensor, host in self.waiting:
            tensor.data = host


def modules_of(holders: Iterable[Any]) -> list[nn.Module]:
    """The outermost modules among the objects, their attributes, items and closures, each once."""
    seen: set[int] = set()
    found: list[nn.Module] = []
    waiting = list(holders)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | str | bytes | Tensor):
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            found.append(one)
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        else:
            waiting += [cell.cell_contents for cell in getattr(one, "__closure__", None) or ()]
            waiting += [getattr(one, name) for name in ("__self__", "func", "args") if hasattr(one, name)]
            waiting += getattr(one, "__dict__", {}).values()
    return found
