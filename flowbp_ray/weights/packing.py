"""Buckets of tensors as messages: the tensors' bytes in as few arrays as their memory layout allows.

Ray copies an array's bytes into its store once. For each array of a megabyte or more it starts threads, which takes
half a millisecond, in which it could copy megabytes. So tensors that are adjacent in memory
(`buckets.make_contiguous`, ZeRO's flat groups) are sent as one array, without a copy before.
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
"""The position of a tensor: (array index, first byte in it, dtype name, shape). Plain types, which pickle fast."""


@dataclass(frozen=True)
class PackedTensors:
    """Tensors as bytes. arrays: [n] uint8 each. places: the position of each tensor by name, in the given order."""

    arrays: tuple[np.ndarray, ...]
    places: Mapping[str, Place]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """Pack tensors of any device and dtype. Tensors on the host are not copied: keep them until this is sent."""
        dense = {name: t if t.is_contiguous() else t.contiguous() for name, t in tensors.items()}
        return Layout.of(dense).pack(dense)

    def bytes(self) -> list[Tensor]:
        """The arrays as tensors [n] uint8, without a copy; those from Ray's object store are read-only."""
        empty = torch.empty(0, dtype=torch.uint8)  # torch cannot view an empty numpy array, because of its stride
        return [unpack(Packed(array, "uint8")) if len(array) else empty for array in self.arrays]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as views of `bytes()`."""
        arrays = self.bytes()
        return {name: tensor_at(arrays[place[0]], place) for name, place in self.places.items()}


@dataclass(frozen=True)
class Layout:
    """The memory layout of dense tensors.

    runs: (name of the first tensor, bytes) of each run of adjacent tensors. held: the addresses of all tensors, and
    the address and size of each run's storage; the layout is valid as long as these are unchanged.
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
        """Whether these tensors, with the same names, shapes and dtypes, still have this layout."""
        return _held(self.runs, tensors) == self.held

    def pack(self, tensors: Mapping[str, Tensor]) -> PackedTensors:
        return PackedTensors(tuple(_bytes(tensors[name], size).cpu().numpy() for name, size in self.runs), self.places)


class Packer:
    """Packs the same tensors repeatedly. Their layout is computed once, and again only if they have moved."""

    def __init__(self) -> None:
        self.layouts: dict[tuple[str, ...], Layout] = {}

    def pack(self, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """Pack the trained parameters of a bucket, as `PackedTensors.of` does."""
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
    """The tensor at `place` in `array` [n] uint8, as a view."""
    _, start, kind, shape = place
    dtype: torch.dtype = getattr(torch, kind)
    return array[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def merge_tensors(packed: Iterable[PackedTensors]) -> dict[str, Tensor]:
    """Return the tensors of all packed buckets by name."""
    return {name: tensor for bucket in packed for name, tensor in bucket.tensors().items()}


def _runs(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Group tensors that follow each other in one storage with a gap below ALIGNED bytes; yields their names.

    Each tensor's offset from the first one is a multiple of its element size.
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
    """`count` bytes of the storage of `first`, from its first element on: [count] uint8."""
    start = first.data_ptr() - first.untyped_storage().data_ptr()
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())  # type: ignore[call-overload]
    return whole[start : start + count]


class Receiver:
    """Installs published weights into the trained parameters of a module. nbytes: the size of one version."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout: list[Mapping[str, Place]] = []  # of the own memory; nearly always that of every later version
        self.arrays: list[Tensor] = []
        self.nbytes = 0

    @torch.no_grad()
    def install(self, packed: Sequence[PackedTensors]) -> None:
        """Copy a version into the module. Raises ValueError if its tensors are not exactly the trained parameters."""
        arrived = [array for bucket in packed for array in bucket.bytes()]
        layout = [bucket.places for bucket in packed]
        if layout != self.layout or [len(a) for a in arrived] != [len(a) for a in self.arrays]:
            self._adopt(packed)
            self.layout = layout
        for mine, array in zip(self.arrays, arrived, strict=True):
            mine.copy_(array)

    def _adopt(self, packed: Sequence[PackedTensors]) -> None:
        """Move the parameters into memory with the layout of `packed`, so that versions are copied array by array."""
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
