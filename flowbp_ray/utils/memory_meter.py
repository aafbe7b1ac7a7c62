"""The memory that a computation takes, counted from the tensors that it makes: on CPUs, and for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages alive, and their peak: what `torch.cuda.max_memory_allocated` says, on a CPU.

    Every operator's outputs are counted while their storage lives, each storage once, recomputed ones and gradients
    included; what an operator needs only inside is not.
    """

    def __init__(self, counted: Iterable[Tensor] = (), ignored: Iterable[Tensor] = ()) -> None:
        """counted, ignored: tensors that exist already; ignored ones do not count, and neither do views of them."""
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in ignored}
        for tensor in counted:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def measure(self, work: Callable[[], object]) -> int:
        """The peak while `work` runs, what was counted before included."""
        with self:
            work()
        return self.peak

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        weakref.finalize(storage, self._remove, key, nbytes).atexit = False
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes
