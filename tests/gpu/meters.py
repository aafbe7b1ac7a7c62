"""What the operators of a computation do on the stand-in: where the host would wait, and which operators run there."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowbp_ray.utils import accelerator
from tests.gpu import standin
from tests.paths import ROOT


class Waits(TorchDispatchMode):
    """Counts the waits inside its context, each with the library's line that caused it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __enter__(self) -> Waits:
        self.before = standin.waits()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.kinds = standin.waits() - self.before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = standin.waits()
        result = func(*args, **(kwargs or {}))
        for kind, count in (standin.waits() - before).items():
            self.places[f"{kind} at {_place()}"] += count
        return result

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def __repr__(self) -> str:
        return "\n".join(f"{count} x {place}" for place, count in self.places.most_common())


class Operators(TorchDispatchMode):
    """Remembers the operators that ran on the stand-in inside its context, and a line of the library for each."""

    def __init__(self, wanted: Sequence[str]) -> None:
        super().__init__()
        self.wanted, self.found = frozenset(wanted), dict[str, str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.wanted and name not in self.found:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if any(t.device.type == accelerator.KIND for t in tensors):
                self.found[name] = _place()
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of the library on the stack, and of what it called, if that is elsewhere."""
    frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
    if not frames:
        return "a backward, in torch's own thread"
    own = [f for f in frames if f.filename.startswith(str(ROOT / "flowbp_ray"))]
    inner = own[-1] if own else frames[-1]
    said = f"{inner.filename.removeprefix(str(ROOT)).lstrip('/')}:{inner.lineno}"
    last = frames[-1]
    return said if last is inner else f"{said} via {last.filename.rpartition('site-packages/')[2]}:{last.lineno}"
