"""A bucket of tensors on its way: their bytes in as few arrays as their memory allows.

Ray copies an array's bytes into its store once, and starts threads for each array of a megabyte or more: half a
millisecond, in which it copies megabytes. So tensors that lie one behind the other (`buckets.lay_out`, ZeRO's flat
groups) travel as one array, without being copied before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowbp_ray.buckets import ALIGNED
from flowbp_ray.messages import Packed

Place = tuple[int, int, str, tuple[int, ...]]
"""Where a tensor is: the number of its array, its first byte there, dtype, shape. Plain, to be pickled fast."""


@dataclass(frozen=True)
class Parcel:
    """arrays: bytes, [n] uint8 each. places: by name, in the order in which the tensors were given."""

    arrays: tuple[np.ndarray, ...]
    places: Mapping[str, Place]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Parcel:
        """Tensors of any device and dtypes. What is on the host is not copied: its memory must stay until then."""
        arrays: list[np.ndarray] = []
        places: dict[str, Place] = {}
        dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        for run in _runs(dense):
            first, last = dense[run[0]], dense[run[-1]]
            base, end = first.data_ptr(), last.data_ptr() + last.nbytes
            for name in run:
                tensor = dense[name]
                dtype = str(tensor.dtype).removeprefix("torch.")
                places[name] = (len(arrays), tensor.data_ptr() - base, dtype, tuple(tensor.shape))
            arrays.append(_bytes(first, end - base).cpu().numpy())
        return cls(tuple(arrays), places)

    def tensors(self) -> dict[str, Packed]:
        """Each tensor by itself; nothing is copied, and what came from the store is read-only."""
        found = {}
        for name, (array, start, kind, shape) in self.places.items():
            dtype = np.dtype("uint16" if kind == "bfloat16" else kind)
            size = math.prod(shape) * dtype.itemsize
            found[name] = Packed(self.arrays[array][start : start + size].view(dtype).reshape(shape), kind)
        return found


def _runs(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that follow each other in one storage, with no more than alignment between them."""
    run: list[str] = []
    for name, tensor in tensors.items():
        if run:
            before = tensors[run[-1]]
            gap = tensor.data_ptr() - before.data_ptr() - before.nbytes
            together = tensor.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
            if not together or not 0 <= gap < ALIGNED:
                yield run
                run = []
        run.append(name)
    if run:
        yield run


def _bytes(first: Tensor, count: int) -> Tensor:
    """`count` bytes of the storage from where `first` starts [count] uint8."""
    start = first.data_ptr() - first.untyped_storage().data_ptr()
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())  # type: ignore[call-overload]
    return whole[start : start + count]
