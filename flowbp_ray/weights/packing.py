"""A bucket of tensors on its way: their bytes in as few arrays as their memory allows.

Ray copies an array's bytes into its store once, and starts threads for each array of a megabyte or more: half a
millisecond, in which it copies megabytes. So tensors that lie one behind the other (`buckets.lay_out`, ZeRO's flat
groups) travel as one array, without being copied before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from flowbp_ray.messages import Packed, unpack
from flowbp_ray.weights.buckets import ALIGNED
from flowbp_ray.weights.trainable import check_names, trained

Place = tuple[int, int, str, tuple[int, ...]]
"""Where a tensor is: the number of its array, its first byte there, dtype, shape. Plain, to be pickled fast."""


@dataclass(frozen=True)
class PackedTensors:
    """arrays: bytes, [n] uint8 each. places: by name, in the order in which the tensors were given."""

    arrays: tuple[np.ndarray, ...]
    places: Mapping[str, Place]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """Tensors of any device and dtypes. What is on the host is not copied: its memory must stay until then."""
        dense = {name: t if t.is_contiguous() else t.contiguous() for name, t in tensors.items()}
        return Layout.of(dense).pack(dense)

    def bytes(self) -> list[Tensor]:
        """The arrays as tensors [n] uint8; nothing is copied, and what came from the store is read-only."""
        empty = torch.empty(0, dtype=torch.uint8)  # numpy's own has a stride that torch cannot view
        return [unpack(Packed(array, "uint8")) if len(array) else empty for array in self.arrays]

    def tensors(self) -> dict[str, Tensor]:
        """Each tensor by itself, as `bytes`."""
        arrays = self.bytes()
        return {name: tensor_at(arrays[place[0]], place) for name, place in self.places.items()}


@dataclass(frozen=True)
class Layout:
    """Where dense tensors lie in memory. runs: the first name and the bytes of each stretch.

    held: all their addresses, and address and size of the storage of each stretch: who finds them again has the same.
    """

    runs: tuple[tuple[str, int], ...]
    places: Mapping[str, Place]
    held: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        runs: list[tuple[str, int]] = []
        places: dict[str, Place] = {}
        for run in _runs(tensors):
            first, last = tensors[run[0]], tensors[run[-1]]
            base = first.data_ptr()
            for name in run:
                tensor = tensors[name]
                places[name] = (len(runs), tensor.data_ptr() - base, _name(tensor.dtype), tuple(tensor.shape))
            runs.append((run[0], last.data_ptr() + last.nbytes - base))
        return cls(tuple(runs), places, _held(runs, tensors))

    def still(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors, of the same names, shapes and dtypes, lie so."""
        return _held(self.runs, tensors) == self.held

    def pack(self, tensors: Mapping[str, Tensor]) -> PackedTensors:
        return PackedTensors(tuple(_bytes(tensors[name], size).cpu().numpy() for name, size in self.runs), self.places)


class Packer:
    """Packs of the same tensors again and again. Where they lie is found out once, unless they have moved."""

    def __init__(self) -> None:
        self.layouts: dict[tuple[str, ...], Layout] = {}

    def pack(self, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """`PackedTensors.of` the trained parameters of a bucket."""
        if not all(tensor.is_contiguous() for tensor in tensors.values()):
            return PackedTensors.of(tensors)
        names = tuple(tensors)
        layout = self.layouts.get(names)
        if layout is None or not layout.still(tensors):
            layout = self.layouts[names] = Layout.of(tensors)
        return layout.pack(tensors)


def _held(runs: Sequence[tuple[str, int]], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    storages = [tensors[name].untyped_storage() for name, _ in runs]
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    return (*addresses, *(s.data_ptr() for s in storages), *(s.nbytes() for s in storages))


def tensor_at(array: Tensor, place: Place) -> Tensor:
    """The tensor that lies at `place` of `array` [n] uint8; nothing is copied."""
    _, start, kind, shape = place
    dtype: torch.dtype = getattr(torch, kind)
    return array[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def merge_tensors(packed: Iterable[PackedTensors]) -> dict[str, Tensor]:
    """The tensors of all packed buckets by name."""
    return {name: tensor for bucket in packed for name, tensor in bucket.tensors().items()}


def _runs(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that follow each other in one storage, with no more than alignment between them.

    Each starts at a multiple of its elements' bytes, counted from the first.
    """
    run: list[str] = []
    storage = first = end = 0
    for name, tensor in tensors.items():
        start, own = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        if run and not (own == storage and 0 <= start - end < ALIGNED and (start - first) % tensor.itemsize == 0):
            yield run
            run = []
        if not run:
            storage, first = own, start
        run.append(name)
        end = start + tensor.nbytes
    if run:
        yield run


@lru_cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(first: Tensor, count: int) -> Tensor:
    """`count` bytes of the storage from where `first` starts [count] uint8."""
    start = first.data_ptr() - first.untyped_storage().data_ptr()
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())  # type: ignore[call-overload]
    return whole[start : start + count]


class Receiver:
    """The trained parameters of a module, on the device where they are. nbytes: of a version."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout: list[Mapping[str, Place]] = []  # as they lie now: nearly always as all versions of a run come
        self.arrays: list[Tensor] = []
        self.nbytes = 0

    @torch.no_grad()
    def install(self, packed: Sequence[PackedTensors]) -> None:
        """Copy a version into the module. Raises ValueError where its tensors are not those that are trained."""
        arrived = [array for bucket in packed for array in bucket.bytes()]
        layout = [bucket.places for bucket in packed]
        if layout != self.layout or [len(a) for a in arrived] != [len(a) for a in self.arrays]:
            self._adopt(packed)
            self.layout = layout
        for mine, array in zip(self.arrays, arrived, strict=True):
            mine.copy_(array)

    def _adopt(self, packed: Sequence[PackedTensors]) -> None:
        """Lay the parameters out in memory as these are."""
        own = trained(self.module)
        check_names(own, [name for bucket in packed for name in bucket.places])
        self.layout, self.arrays = [], []
        for bucket in packed:
            arrays = [torch.empty_like(array, device=next(iter(own.values())).device) for array in bucket.bytes()]
            for name, place in bucket.places.items():
                own[name].data = _fitting(name, tensor_at(arrays[place[0]], place), own[name])
            self.arrays += arrays
        self.nbytes = sum(p.nbytes for p in own.values())


def _fitting(name: str, arrived: Tensor, own: Tensor) -> Tensor:
    if (arrived.shape, arrived.dtype) != (own.shape, own.dtype):
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (arrived, own)]
        raise ValueError(f"published weights do not fit: {name} is {kinds[0]} and not {kinds[1]}")
    return arrived
